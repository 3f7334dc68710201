/** The samples of a run: a strip of small pictures with their steps, and one of them large. */

import { element } from "./dom.js";

const SIZES = [84, 66, 54]; // px of a picture where a step has one, two, or more

export class Strip {
  element = element("div", { className: "strip", role: "group", "aria-label": "Samples" });
  #looked;
  #address;
  #columns = new Map(); // "step pictures at" -> its element
  #samples = [];
  #atEnd = true; // as long as the hand has not scrolled to earlier ones

  /** address(step, number, at, small) is where a picture lies; looked(step) hears which step is pointed at, or null. */
  constructor(address, looked) {
    this.#address = address;
    this.#looked = looked;
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.element.addEventListener("scroll", () => {
      const { scrollLeft, clientWidth, scrollWidth } = this.element;
      if (clientWidth) this.#atEnd = scrollLeft + clientWidth >= scrollWidth - 4;
    });
    new ResizeObserver(() => this.#settle()).observe(this.element);
    this.element.addEventListener("wheel", (event) => {
      if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) event.stopPropagation(); // it scrolls
    });
  }

  show(samples) {
    const there = new Map(samples.map((each) => [each.join(" "), each]));
    if (there.size === this.#columns.size && [...there.keys()].every((key) => this.#columns.has(key))) return;
    const strip = this.element;
    this.#samples = samples;
    this.#columns = new Map([...there].map(([key, each]) => [key, this.#columns.get(key) ?? this.#column(each)]));
    strip.replaceChildren(...this.#columns.values());
    const most = Math.max(0, ...samples.map((each) => each[1]));
    strip.style.setProperty("--size", `${SIZES[Math.min(most, SIZES.length) - 1] ?? 0}px`);
    strip.classList.toggle("some", samples.length > 0);
    this.#takeTab();
    this.#settle();
  }

  /** Stays at the latest sample, if that is where it was. */
  #settle() {
    if (this.#atEnd) this.element.scrollLeft = this.element.scrollWidth;
  }

  #column([step, pictures, at]) {
    const column = element("div", { className: "column", "data-step": step });
    for (let number = 0; number < pictures; number++) {
      const label = `Sample at step ${step}${pictures > 1 ? `, ${number + 1} of ${pictures}` : ""}`;
      const src = this.#address(step, number, at, true);
      const small = element("img", { src, alt: "", draggable: false, onload: () => this.#settle() });
      const button = element("button", { type: "button", title: `${label}: show it large`, "aria-label": label }, small);
      button.tabIndex = -1;
      button.addEventListener("click", () => this.#open(step, number));
      column.append(button);
    }
    column.append(element("span", { className: "step" }, String(step)));
    for (const [event, where] of [["pointerenter", step], ["pointerleave", null], ["focusin", step], ["focusout", null]])
      column.addEventListener(event, () => this.#looked(where));
    return column;
  }

  /** One of the pictures is where Tab leads to: the last. The arrow keys lead on. */
  #takeTab() {
    const buttons = [...this.element.querySelectorAll("button")];
    if (buttons.some((each) => each.tabIndex === 0 && each === document.activeElement)) return;
    buttons.forEach((each) => (each.tabIndex = -1));
    const final = this.element.lastElementChild?.querySelector("button");
    if (final) final.tabIndex = 0;
  }

  #key(event) {
    const column = event.target.closest(".column");
    const number = [...column.querySelectorAll("button")].indexOf(event.target);
    const [across, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    if (across === undefined) return;
    const columns = [...this.element.children];
    const there = columns[columns.indexOf(column) + across]?.querySelectorAll("button") ?? [];
    const found = there[Math.min(number, there.length - 1) + down];
    if (found) {
      event.target.tabIndex = -1;
      found.tabIndex = 0;
      found.focus({ preventScroll: true });
      const [box, within] = [found.parentElement, this.element];
      const end = box.offsetLeft + box.offsetWidth - within.clientWidth;
      within.scrollLeft = Math.max(end, Math.min(within.scrollLeft, box.offsetLeft));
    }
    event.preventDefault();
    event.stopPropagation();
  }

  #open(step, number) {
    const back = document.activeElement;
    const address = (...picture) => this.#address(...picture, false);
    enlarge(this.#samples, step, number, address, () => back?.focus({ preventScroll: true }));
  }
}

/** Shows a sample over the page. Left and right lead through the steps, up and down through the pictures of one. */
function enlarge(samples, step, number, address, closed) {
  let place = samples.findIndex((each) => each[0] === step);
  const picture = element("img", { alt: "" });
  const caption = element("div", { className: "caption", "aria-live": "polite" });
  const show = (across, down) => {
    place = Math.max(0, Math.min(samples.length - 1, place + across));
    const [at, pictures, time] = samples[place];
    number = Math.max(0, Math.min(pictures - 1, number + down));
    picture.src = address(at, number, time);
    caption.textContent = `Step ${at}${pictures > 1 ? ` · picture ${number + 1} of ${pictures}` : ""}`;
    picture.alt = `Sample: ${caption.textContent}`;
    earlier.setAttribute("aria-disabled", String(place === 0)); // not disabled: it would lose the focus
    later.setAttribute("aria-disabled", String(place === samples.length - 1));
  };
  const turn = (label, sign, across) => {
    const properties = { type: "button", className: "turn", title: label, onclick: () => show(across, 0) };
    return element("button", { ...properties, "aria-label": label }, sign);
  };
  const earlier = turn("Earlier step", "‹", -1);
  const later = turn("Later step", "›", 1);
  const figure = element("figure", {}, picture, caption);
  const dialog = element("dialog", { className: "lora_ops_sample", "aria-label": "Sample" }, earlier, figure, later);
  dialog.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      show(...moves[event.key]);
      event.preventDefault();
    }
    if (event.key !== "Escape") event.stopPropagation(); // keys are not the canvas's; Escape is the dialog's own
  });
  dialog.addEventListener("click", (event) => event.target.closest(".turn") || dialog.close());
  dialog.addEventListener("close", () => {
    dialog.remove();
    closed();
  });
  for (const event of ["wheel", "pointerdown"]) dialog.addEventListener(event, (each) => each.stopPropagation());
  show(0, 0);
  document.body.append(dialog);
  dialog.showModal();
}
