// The page: pictures wait in a row and go to the server one after another, as jobs, whose progress comes as events.
import * as api from "./api.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const viewer = new Viewer();
const row = [];
let working = false;
let jobs = true;

class Picture {
  constructor(file, options) {
    this.file = file;
    this.name = file.name || "pasted.png";
    this.options = options;
    this.state = "waiting";
    this.abort = new AbortController();
    this.before = URL.createObjectURL(file);
    this.element = this.build();
    this.tell("waits");
  }

  build() {
    const item = document.createElement("li");
    const image = Object.assign(document.createElement("img"), { src: this.before, alt: "" });
    image.addEventListener("error", () => (image.style.visibility = "hidden"));
    const text = document.createElement("div");
    this.line = Object.assign(document.createElement("p"), { className: "state" });
    this.bar = Object.assign(document.createElement("progress"), { max: 1, hidden: true });
    this.bar.setAttribute("aria-label", `Progress of ${this.name}`);
    text.append(Object.assign(document.createElement("p"), { textContent: this.name }), this.line, this.bar);
    this.actions = Object.assign(document.createElement("div"), { className: "actions" });
    this.actions.append(button("Remove", () => this.remove(), `Remove ${this.name}`));
    item.append(image, text, this.actions);
    return item;
  }

  tell(words, said = false) {
    this.line.textContent = words;
    if (said) $("said").textContent = `${this.name}: ${words}`;
  }

  async work() {
    this.state = "running";
    const started = performance.now();
    let words = "is sent";
    const clock = setInterval(() => this.tell(`${words}, ${seconds(started)}`), 250);
    this.bar.hidden = false;
    this.bar.removeAttribute("value");
    try {
      const [blob, notes] = jobs ? await this.asJob((now) => (words = now)) : await api.upscale(this.file, this.options, this.abort.signal);
      clearInterval(clock);
      this.finish(blob, notes, started);
    } catch (error) {
      clearInterval(clock);
      if (this.state === "running") this.fail(error);
    } finally {
      if (this.job) api.forget(this.job).catch(() => {});
      this.bar.hidden = true;
    }
  }

  async asJob(tell) {
    const job = await api.startJob(this.file, this.options, this.abort.signal);
    this.job = job.id;
    let last = job;
    for await (const facts of api.events(job.id, this.abort.signal)) {
      last = facts;
      tell(facts.state === "running" ? "is enlarged" : "waits in the server's line");
      if (facts.progress > 0) this.bar.value = facts.progress;
    }
    if (last.problem) throw new api.Problem(last.problem);
    tell("is fetched");
    return [await api.result(job.id, this.abort.signal), last.result.notes];
  }

  finish(blob, noted, started) {
    this.state = "done";
    this.after = URL.createObjectURL(blob);
    const ending = blob.type.replace("image/", "").replace("jpeg", "jpg").replace("tiff", "tif");
    this.result = `${this.name.replace(/\.[^.]*$/, "")}_x${this.options.scale}.${ending}`;
    const notes = noted.length ? `; ${noted.join("; ")}` : "";
    this.tell(`enlarged ${this.options.scale} times in ${seconds(started)}, ${bytes(blob.size)}${notes}`, true);
    const link = Object.assign(document.createElement("a"), { href: this.after, download: this.result, textContent: "Download" });
    link.className = "button main";
    link.setAttribute("aria-label", `Download ${this.result}`);
    this.actions.prepend(button("Compare", () => this.show(true), `Compare ${this.name} before and after`), link);
    if (!viewer.shown) this.show(false);
  }

  fail(error) {
    this.state = "failed";
    this.element.classList.add("failed");
    this.tell(error.message, true);
    if (error.status === 401) askForToken("");
    const again = button("Try again", () => { again.remove(); this.element.classList.remove("failed"); this.state = "waiting"; this.options = settings(); this.tell("waits"); next(); });
    this.actions.prepend(again);
  }

  show(focus) {
    for (const other of row) other.element.classList.toggle("shown", other === this);
    viewer.show(this, focus);
  }

  remove() {
    this.state = "removed";
    this.abort.abort();
    if (viewer.shown === this) viewer.hide();
    for (const url of [this.before, this.after]) if (url) URL.revokeObjectURL(url);
    const place = row.indexOf(this);
    row.splice(place, 1);
    this.element.remove();
    (row[Math.min(place, row.length - 1)]?.actions.querySelector("button") ?? $("files")).focus();
  }
}

function button(text, action, label = text) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

const seconds = (since) => `${((performance.now() - since) / 1000).toFixed(1)} s`;
const bytes = (count) => (count < 1e6 ? `${Math.max(1, Math.round(count / 1e3))} kB` : `${(count / 1e6).toFixed(1)} MB`);

function settings() {
  const found = Object.fromEntries(new FormData($("settings")));
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value));
}

function add(files) {
  for (const file of files) {
    const picture = new Picture(file, settings());
    row.push(picture);
    $("pictures").append(picture.element);
  }
  next();
}

async function next() {
  if (working || !$("door").hidden) return;
  working = true;
  for (let picture; (picture = row.find((each) => each.state === "waiting")) && $("door").hidden; ) await picture.work();
  working = false;
}

function fill(select, values, chosen, words = (value) => value) {
  select.replaceChildren(...values.map((value) => new Option(words(value), value, false, String(value) === String(chosen))));
}

function askForToken(words) {
  $("door").hidden = false;
  $("refused").textContent = words;
  $("token").focus();
}

async function start() {
  try {
    const about = await api.about();
    jobs = about.jobs;
    const scales = Object.keys(about.weights);
    const kinds = () => fill($("weights"), about.weights[$("scale").value] ?? ["auto"], $("weights").value);
    fill($("scale"), scales.length ? scales : [about.scale], about.scale, (scale) => `${scale} times`);
    kinds();
    $("scale").onchange = kinds;
    $("door").hidden = true;
    next();
  } catch (error) {
    if (error.status === 401) askForToken(api.hasToken() ? "Another one is expected." : "");
    else $("said").textContent = error.message;
  }
}

$("settings").addEventListener("submit", (event) => event.preventDefault());
$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useToken($("token").value.trim());
  for (const each of row) if (each.state === "failed") each.actions.querySelector("button").click();
  start();
});
$("files").addEventListener("change", () => { add($("files").files); $("files").value = ""; });
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") add(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});
start();
