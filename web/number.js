/** A number to drag, to step through with the arrow keys or to type. */

import { element } from "./dom.js";
import { format, moved, stepFor, typed } from "./rows.js";

const THRESHOLD = 3; // px that a hand moves without meaning it

export class NumberField {
  element;
  #given;
  #value;

  /**
   * part names it for the page, label for people. set(value) hears every change, done() the end of each. clear(),
   * where there is one, hears that the field was emptied. A drag ends at min and max, and what is typed lies within.
   */
  constructor(value, { part, label, set, done, clear, min = -Infinity, max = Infinity }) {
    this.#given = { label, set, done, clear, min, max };
    this.element = element("span", {
      className: "number",
      tabIndex: 0,
      role: "spinbutton",
      "aria-label": label,
      "data-part": part,
      onpointerdown: (event) => this.#drag(event),
      ondblclick: () => this.#type(),
      onkeydown: (event) => this.#key(event),
    });
    this.show(value);
  }

  show(value) {
    this.#value = value;
    this.element.textContent = format(value);
    this.element.title = `${this.#given.label}: ${value}\nDrag (Shift finer, Ctrl coarser) or double-click to type`;
    this.element.setAttribute("aria-valuenow", value);
  }

  #set(value) {
    this.show(value);
    this.#given.set(value);
  }

  #step(steps, event) {
    const { min, max } = this.#given;
    this.#set(Math.max(min, Math.min(max, moved(this.#value, steps, stepFor(event)))));
  }

  #drag(event) {
    if (event.button !== 0) return;
    const field = this.element;
    let last = event.clientX;
    let dragging = false;
    field.setPointerCapture(event.pointerId);
    field.onpointermove = (move) => {
      if (!dragging && Math.abs(move.clientX - last) < THRESHOLD) return;
      dragging = true;
      field.classList.add("dragging");
      const steps = Math.round(move.clientX - last);
      last += steps;
      if (steps) this.#step(steps, move);
    };
    field.onlostpointercapture = () => {
      field.onpointermove = field.onlostpointercapture = null;
      field.classList.remove("dragging");
      if (dragging) this.#given.done();
    };
  }

  #key(event) {
    const steps = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (steps && !event.altKey) {
      this.#step(steps, event);
      this.#given.done();
    } else if (event.ctrlKey || event.metaKey) return; // the host's
    else if (event.key === "Enter") this.#type();
    else if (/^[-.,\d]$/.test(event.key)) this.#type(event.key);
    else if (this.#given.clear && (event.key === "Delete" || event.key === "Backspace")) this.#given.clear();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #type(first) {
    const { label, done, clear, min, max } = this.#given;
    const input = element("input", { className: "number", type: "text", inputMode: "decimal", "aria-label": label });
    input.value = first ?? String(this.#value);
    const number = () => {
      const value = typed(input.value);
      return value !== null && value >= min && value <= max ? value : null;
    };
    const end = (take, focus = false) => {
      const [text, value] = [input.value.trim(), number()];
      input.onblur = null;
      input.replaceWith(this.element);
      if (focus) this.element.focus({ preventScroll: true });
      if (!take || value === this.#value) return;
      if (value !== null) {
        this.#set(value);
        done();
      } else if (!text) clear?.();
    };
    input.onblur = () => end(true);
    input.oninput = () => input.setAttribute("aria-invalid", String(input.value.trim() !== "" && number() === null));
    input.onkeydown = (event) => {
      if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); // Ctrl+Enter runs the workflow
      if (event.key === "Enter" && input.getAttribute("aria-invalid") !== "true") end(true, true);
      else if (event.key === "Escape") end(false, true);
    };
    this.element.replaceWith(input);
    input.focus({ preventScroll: true });
    if (first === undefined) input.select();
    else input.oninput();
  }
}
