/** The chart of a run: loss, smoothed and validation loss by step, with marks where it saved, was best and went on. */

import { last, loss, range, thinned, ticks, upTo } from "./history.js";

const SVG = "http://www.w3.org/2000/svg"; // a picture that has the theme's colours and is sharp at every zoom
const LEFT = 36; // px for the numbers beside the chart
const BOTTOM = 15; // and below it
const TOP = 8;
const RIGHT = 10;
const SAVE = 3.5; // px that the mark of a save reaches around its step

export class Curve {
  element = node("svg", { class: "curve", role: "img", tabindex: 0 });
  #told;
  #run = null;
  #log = false;
  #step = null; // under the pointer, or chosen with the keys
  #cursor = node("g", { class: "cursor" });
  #x = () => 0;
  #y = () => 0;

  /** told(step, text) hears which step is looked at, null when none is. */
  constructor(told) {
    this.#told = told;
    const { element } = this;
    element.addEventListener("pointermove", (event) => this.#follow(event));
    element.addEventListener("pointerleave", () => this.look(null));
    element.addEventListener("blur", () => this.look(null));
    element.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#draw()).observe(element);
  }

  show(run, log) {
    this.#run = run;
    this.#log = log;
    this.#draw();
  }

  /** Shows where a step is. */
  look(step) {
    this.#step = step;
    this.#drawCursor();
    this.#told(this.#step);
  }

  #draw() {
    const [width, height] = [this.element.clientWidth, this.element.clientHeight];
    const run = this.#run;
    if (!run || !width || !height) return;
    this.element.setAttribute("aria-label", described(run));
    const parts = [];
    if (run.points.length) {
      const [low, high] = range(run, this.#log);
      const scale = this.#log ? Math.log10 : (value) => value;
      const [right, bottom] = [width - RIGHT, height - BOTTOM];
      const first = run.points[0][0];
      const span = Math.max(1, last(run) - first);
      this.#x = (step) => LEFT + ((step - first) / span) * (right - LEFT);
      this.#y = (value) => {
        if (value === null || (this.#log && value <= 0)) return null;
        return bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (bottom - TOP);
      };
      parts.push(...this.#grid(low, high, first, right, bottom), ...this.#lines(right, bottom), ...this.#marks(bottom));
    } else {
      parts.push(text("Losses appear with the first step", { x: width / 2, y: height / 2, class: "empty" }));
    }
    this.element.replaceChildren(...parts, this.#cursor);
    this.#drawCursor();
  }

  #grid(low, high, first, right, bottom) {
    const room = bottom - TOP;
    const found = [];
    for (const value of ticks(low, high, Math.max(2, Math.round(room / 36)), this.#log)) {
      const y = this.#y(value);
      found.push(node("line", { class: "grid", x1: LEFT, x2: right, y1: y, y2: y }));
      found.push(text(short(value), { x: LEFT - 6, y: y + 3, class: "y" }));
    }
    const whole = ticks(first, Math.max(last(this.#run), first + 1), Math.max(2, Math.floor((right - LEFT) / 80)));
    for (const step of whole.filter(Number.isInteger)) {
      const [label, x] = [String(step), this.#x(step)];
      found.push(text(label, { x: Math.min(x, right + RIGHT - 3 * label.length), y: bottom + 11, class: "x" }));
    }
    return found;
  }

  /** What lies outside is drawn along the edge. */
  #lines(right, bottom) {
    const run = this.#run;
    const inside = (y) => Math.max(TOP - 3, Math.min(bottom + 2, y));
    const path = (marks, column) => {
      let found = "";
      for (const mark of marks) {
        const y = this.#y(mark[column]);
        if (y !== null) found += `${found ? "L" : "M"}${this.#x(mark[0]).toFixed(1)} ${inside(y).toFixed(1)}`;
      }
      return found;
    };
    const points = thinned(run.points, Math.max(100, 2 * (right - LEFT)));
    return [
      node("path", { class: "raw", d: path(points, 1) }),
      node("path", { class: "smoothed", d: path(points, 2) }),
      node("path", { class: "validation", d: path(run.validations, 1) }),
      ...(run.points.length === 1 ? [this.#dot(run.points[0][0], run.points[0][2], "smoothed", 2.5)] : []),
      ...(run.validations.length <= 60 ? run.validations.map(([step, value]) => this.#dot(step, value, "validation", 2)) : []),
    ];
  }

  #marks(bottom) {
    const run = this.#run;
    const best = run.validations.findLast((each) => each[2]);
    const bestSave = run.saves.findLast((each) => each[1]);
    const inside = ([step]) => step >= run.points[0][0];
    return [
      ...run.resumed.map((step) => {
        const x = this.#x(step);
        return titled(node("line", { class: "resumed", x1: x, x2: x, y1: TOP, y2: bottom }), `Went on from step ${step}`);
      }),
      node("line", { class: "axis", x1: LEFT, x2: this.#x(last(run)), y1: bottom, y2: bottom }),
      ...run.saves.filter(inside).map(([step]) => {
        const isBest = step === bestSave?.[0];
        const x = this.#x(step);
        const corners = `${x - SAVE},${bottom + 0.5} ${x + SAVE},${bottom + 0.5} ${x},${bottom - 2 * SAVE + 1}`;
        const mark = node("polygon", { class: isBest ? "save best" : "save", points: corners, "data-step": step });
        return titled(mark, `Saved at step ${step}${isBest ? ", the best" : ""}`);
      }),
      ...(best ? [titled(this.#dot(best[0], best[1], "best", 4), `Best validation loss, at step ${best[0]}`)] : []),
    ];
  }

  #dot(step, value, kind, r) {
    return node("circle", { class: `dot ${kind}`, cx: this.#x(step), cy: this.#y(value) ?? -9, r, "data-step": step });
  }

  #drawCursor() {
    const run = this.#run;
    this.#cursor.replaceChildren();
    if (this.#step === null || !run?.points.length) return;
    const step = Math.max(run.points[0][0], Math.min(this.#step, last(run)));
    const [x, bottom] = [this.#x(step), this.element.clientHeight - BOTTOM];
    const point = upTo(run.points, step);
    const label = said(run, step);
    const end = x > this.element.clientWidth - 6 * label.length - 12;
    this.#cursor.append(
      node("line", { x1: x, x2: x, y1: TOP - 4, y2: bottom }),
      this.#dot(point[0], point[1], "raw", 2.5),
      this.#dot(point[0], point[2], "smoothed", 3),
      text(label, { x: end ? x - 5 : x + 5, y: TOP + 4, class: end ? "end" : "" }),
    );
  }

  #follow(event) {
    const run = this.#run;
    if (!run?.points.length) return;
    const box = this.element.getBoundingClientRect(); // as it is on the screen, zoomed
    const x = ((event.clientX - box.left) / box.width) * this.element.clientWidth;
    const [first, end] = [run.points[0][0], last(run)];
    const step = first + ((x - LEFT) / (this.element.clientWidth - RIGHT - LEFT)) * (end - first);
    this.look(nearest(run.points, Math.max(first, Math.min(end, step))));
  }

  #key(event) {
    const run = this.#run;
    const places = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
    if (event.key === "Escape" && this.#step !== null) this.look(null);
    else if (event.key in places && run?.points.length) {
      const end = run.points.length - 1;
      const from = this.#step === null ? end : run.points.indexOf(upTo(run.points, this.#step));
      const to = this.#step === null ? end : Math.max(0, Math.min(end, from + places[event.key]));
      this.look(run.points[to][0]);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

/** What there is to say of a step beside its losses. */
export function said(run, step) {
  const save = run.saves.find((each) => each[0] === step);
  const best = run.validations.findLast((each) => each[2])?.[0] === step;
  return [`step ${step}`, ...(save ? ["saved"] : []), ...(best ? ["best"] : [])].join(" · ");
}

/** The chart in words. */
function described(run) {
  if (!run.points.length) return "Loss by step: no step yet";
  const [step, raw, smoothed] = run.points.at(-1);
  const told = [`Loss by step: ${loss(raw)} at step ${step}, smoothed ${loss(smoothed)}`];
  const validation = run.validations.at(-1);
  if (validation) told.push(`validation ${loss(validation[1])}`);
  const best = run.validations.findLast((each) => each[2]);
  if (best) told.push(`best ${loss(best[1])} at step ${best[0]}`);
  if (run.saves.length) told.push(`${run.saves.length} saved, the last at step ${run.saves.at(-1)[0]}`);
  return `${told.join("; ")}. Arrow keys read the values.`;
}

function nearest(points, step) {
  const before = upTo(points, step) ?? points[0];
  const after = points[points.indexOf(before) + 1] ?? before;
  return step - before[0] <= after[0] - step ? before[0] : after[0];
}

function short(value) {
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(0) : String(value);
}

function node(tag, attributes) {
  const found = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  return found;
}

function text(content, attributes) {
  const found = node("text", attributes);
  found.textContent = content;
  return found;
}

function titled(found, title) {
  const label = node("title", {});
  label.textContent = title;
  found.append(label);
  return found;
}
