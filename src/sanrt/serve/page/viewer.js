// Before and after, one over the other: what is left of the line is the picture, right of it the result.
const $ = (id) => document.getElementById(id);
const LARGEST = 8; // screen pixels for one of the result
const BORDERS = 2; // of the view; scroll bars, which go when all fits, do not count

export class Viewer {
  constructor() {
    this.shown = null;
    this.scale = 1;
    $("split").addEventListener("input", () => this.split(Number($("split").value)));
    $("zoom").addEventListener("input", () => this.zoom(this.fitting * (LARGEST / this.fitting) ** (Number($("zoom").value) / 100)));
    $("fit").addEventListener("click", () => this.zoom(this.fitting));
    $("pixels").addEventListener("click", () => this.zoom(1 / devicePixelRatio));
    $("handle").addEventListener("pointerdown", (event) => $("handle").setPointerCapture(event.pointerId));
    $("handle").addEventListener("pointermove", (event) => {
      if (!$("handle").hasPointerCapture(event.pointerId)) return;
      const box = $("stage").getBoundingClientRect();
      this.split(Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width)));
    });
    $("view").addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      this.zoom(this.scale * 1.0015 ** -event.deltaY, event);
    }, { passive: false });
    $("view").addEventListener("keydown", (event) => {
      if (event.key === "+" || event.key === "=") this.zoom(this.scale * 1.25);
      if (event.key === "-") this.zoom(this.scale / 1.25);
      if (event.key === "0") this.zoom(this.fitting);
    });
    for (const image of [$("before"), $("after")]) {
      image.addEventListener("error", () => this.tell(`This browser does not show ${image.id === "after" ? "the result's" : "the picture's"} format; Download works.`));
    }
    $("after").addEventListener("load", () => {
      this.size = [$("after").naturalWidth, $("after").naturalHeight];
      $("title").textContent = `${this.shown.result}, ${this.size.join(" x ")}`;
      this.zoom(this.fitting);
    });
    addEventListener("resize", () => this.shown && this.zoom(this.scale));
  }

  get fitting() {
    const [width, height] = this.size;
    return Math.min(LARGEST, ($("view").offsetWidth - BORDERS) / width, ($("view").offsetHeight - BORDERS) / height);
  }

  show(picture, focus) {
    this.shown = picture;
    this.size = [1, 1];
    $("viewer").hidden = false;
    this.tell("");
    $("title").textContent = picture.result;
    $("before").src = picture.before;
    $("after").src = picture.after;
    this.split(50);
    if (focus) {
      $("viewer").scrollIntoView({ block: "nearest" });
      $("split").focus();
    }
  }

  hide() {
    this.shown = null;
    $("viewer").hidden = true;
    for (const image of [$("before"), $("after")]) image.removeAttribute("src");
  }

  split(percent) {
    $("split").value = percent;
    $("split").setAttribute("aria-valuetext", `${Math.round(100 - percent)} % after`);
    $("stage").style.setProperty("--split", `${percent}%`);
  }

  // The point under the pointer, or in the middle, stays where it is.
  zoom(scale, event) {
    const view = $("view");
    const box = view.getBoundingClientRect();
    const [x, y] = event ? [event.clientX - box.left, event.clientY - box.top] : [view.clientWidth / 2, view.clientHeight / 2];
    const next = Math.min(LARGEST, Math.max(this.fitting, scale));
    const ratio = next / this.scale;
    const [left, top] = [(view.scrollLeft + x) * ratio - x, (view.scrollTop + y) * ratio - y];
    this.scale = next;
    $("stage").style.setProperty("--width", `${this.size[0] * next}px`);
    $("stage").style.setProperty("--height", `${this.size[1] * next}px`);
    view.scrollTo(left, top);
    $("percent").textContent = `${Math.round(100 * next * devicePixelRatio)} %`;
    const range = Math.log(LARGEST / this.fitting);
    $("zoom").value = range ? (100 * Math.log(next / this.fitting)) / range : 0;
    for (const image of [$("before"), $("after")]) image.classList.toggle("pixelated", next * devicePixelRatio >= 3);
  }

  tell(words) {
    $("unseen").textContent = words;
    $("unseen").hidden = !words;
  }
}
