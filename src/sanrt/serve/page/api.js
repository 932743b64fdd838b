// What the page asks of the server.
let token = "";

export class Problem extends Error {
  constructor(document) {
    super(document.detail);
    this.status = document.status;
  }
}

export const useToken = (text) => (token = text);
export const hasToken = () => token !== "";

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ detail: "the server does not answer", status: 0 });
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ detail: response.statusText }));
  throw new Problem({ ...problem, status: response.status, wait: response.headers.get("Retry-After") });
}

export const about = async () => (await ask("v1/about")).json();

// A picture waits for a place where the server has none.
async function send(path, file, options, signal) {
  for (;;) {
    try {
      return await ask(`${path}?${new URLSearchParams(options)}`, { method: "POST", body: file, signal });
    } catch (error) {
      if (error.status !== 503) throw error;
      await new Promise((done) => setTimeout(done, 2000));
      signal.throwIfAborted();
    }
  }
}

export const startJob = async (...picture) => (await send("v1/jobs", ...picture)).json();

// For servers of several processes, which have no jobs.
export async function upscale(...picture) {
  const response = await send("v1/upscale", ...picture);
  const note = response.headers.get("Sanrt-Note");
  return [await response.blob(), note ? [note] : []];
}

export async function* events(id, signal) {
  const response = await ask(`v1/jobs/${id}`, { headers: { Accept: "text/event-stream" }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

export const result = async (id, signal) => (await ask(`v1/jobs/${id}/result`, { signal })).blob();
export const forget = (id) => ask(`v1/jobs/${id}`, { method: "DELETE" });
