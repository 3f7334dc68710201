/** The receipt on a node: what its last run told, or why it failed, as text. */

import { element } from "./dom.js";
import { addBelow, redraw } from "./host.js";

const NAME = "lora_ops_receipt";
const TALLEST = 240; // px that a long receipt takes by itself; a taller node shows more of it
const PADDING = 12; // px, above and below the text
const receipts = new WeakMap(); // node -> its Receipt

/** Shows what a run told, in place of what an earlier one did. The text is a stranger's: never markup. */
export function show(node, text, json) {
  receiptOn(node).show(text, json, tone);
}

/** Shows why a node failed, in place of its receipt. */
export function fail(node, error, message) {
  receiptOn(node).show(message, JSON.stringify({ error, message }), () => "bad");
}

/** Marks what a node shows as told by an earlier run. */
export function expire(node) {
  receipts.get(node)?.expire();
}

/** What a line is: "good", "bad", "warning", "aside" or "". */
export function tone(line) {
  if (line.startsWith("✓ ")) return "good";
  if (line.startsWith("! ")) return "bad";
  if (/^ *\d+ (refused|unread): |^ +\d+ of the landed modules are all zero|^ +[\d.]+% of the update/.test(line))
    return "warning";
  return line.startsWith("   ") ? "aside" : "";
}

function receiptOn(node) {
  if (!receipts.has(node)) receipts.set(node, new Receipt(node));
  return receipts.get(node);
}

class Receipt {
  #json = "";
  #lines = element("div", { className: "lines" });
  #root = element("div", { className: NAME });

  constructor(node) {
    this.#root.tabIndex = 0; // for scrolling with the keyboard
    this.#root.append(this.#corner(), this.#lines);
    addBelow(node, NAME, this.#root);
    new ResizeObserver(() => this.#fit(node)).observe(this.#lines);
  }

  show(text, json, tone) {
    this.#json = json;
    this.#lines.replaceChildren(...text.split("\n").map((line) => row(line, tone(line))));
    this.#root.classList.remove("expired");
  }

  expire() {
    this.#root.classList.add("expired");
  }

  #fit(node) {
    this.#root.style.minHeight = `${Math.min(this.#lines.offsetHeight, TALLEST) + PADDING}px`;
    redraw(node);
  }

  #corner() {
    const button = element("button", { title: "Copy this as JSON" }, "JSON");
    button.addEventListener("click", async () => {
      button.textContent = (await copied(this.#json)) ? "copied" : "failed";
      setTimeout(() => (button.textContent = "JSON"), 1500);
    });
    return element("div", { className: "corner" }, element("span", { className: "age" }, "earlier run"), button);
  }
}

/** A line that wraps under its own text, not under its mark. */
function row(line, tone) {
  const found = element("div", { className: tone }, line);
  found.style.setProperty("--hang", `${line.match(/^ *([✓!] )?/)[0].length}ch`);
  return found;
}

/** Whether the text is on the clipboard now. A page that comes over plain http from another machine has no clipboard. */
async function copied(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  const field = document.body.appendChild(element("textarea", { value: text }));
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}
