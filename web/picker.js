/** A searchable list of LoRAs over the page. */

import { element } from "./dom.js";
import { search, split } from "./rows.js";

const CHUNK = 100; // options made at a time: a folder may hold thousands
const GAP = 4; // px between the picker and what it belongs to, and the window's edge
let open = null; // the only one

/**
 * Asks for one of the names (a promise) below an element. picked(name) is told the answer, pasted(text) a text that
 * was pasted and says whether it took it, closed() the end either way. query is what is typed at first.
 */
export function pick(anchor, names, { query = "", label, picked, pasted, closed }) {
  open?.close();
  open = new Picker(anchor, names, { query, label, picked, pasted, closed });
}

class Picker {
  #names = [];
  #found = [];
  #active = 0;
  #told;
  #count = element("div", { className: "count", role: "status" }, "Loading…");
  #list = element("div", { className: "options", role: "listbox", id: "lora_ops_options" });
  #input;
  #root;
  #filled; // a promise
  #end = new AbortController();

  constructor(anchor, names, told) {
    this.#told = told;
    this.#input = element("input", {
      type: "text",
      placeholder: "Search LoRAs",
      spellcheck: false,
      autocomplete: "off",
      role: "combobox",
      "aria-label": told.label,
      "aria-expanded": "true",
      "aria-controls": this.#list.id,
      oninput: () => this.#show(),
      onkeydown: (event) => this.#key(event),
      onpaste: (event) => {
        if (!told.pasted?.(event.clipboardData.getData("text"))) return;
        event.preventDefault();
        this.close();
      },
    });
    this.#list.addEventListener("scroll", () => this.#grow());
    this.#root = element("div", { className: "lora_ops_picker" }, this.#input, this.#list, this.#count);
    for (const event of ["keydown", "keyup", "paste", "copy", "cut", "wheel", "pointerdown"])
      this.#root.addEventListener(event, (each) => each.stopPropagation()); // they are not the canvas's
    document.body.append(this.#root);
    this.#place(anchor.getBoundingClientRect());
    const outside = (event) => this.#root.contains(event.target) || this.close();
    for (const event of ["pointerdown", "wheel"])
      window.addEventListener(event, outside, { capture: true, passive: true, signal: this.#end.signal });
    window.addEventListener("resize", () => this.close(), { signal: this.#end.signal });
    this.#input.focus({ preventScroll: true });
    this.#filled = this.#fill(names, told.query);
  }

  async #fill(names, query) {
    try {
      this.#names = await names;
    } catch {
      this.#count.textContent = "The server does not list its LoRAs";
      return;
    }
    if (query && search(query, this.#names).length) {
      this.#input.value ||= query;
      this.#input.select();
    }
    this.#show();
  }

  close() {
    if (this.#end.signal.aborted) return;
    this.#end.abort();
    this.#root.remove();
    open = null;
    this.#told.closed?.();
  }

  #place(anchor) {
    const { offsetWidth: width, offsetHeight: height } = this.#root;
    const below = window.innerHeight - anchor.bottom;
    const left = Math.max(GAP, Math.min(anchor.left, window.innerWidth - width - GAP));
    const above = below < height + 2 * GAP && anchor.top > below;
    const edge = above ? { bottom: window.innerHeight - anchor.top + GAP } : { top: anchor.bottom + GAP };
    const room = (above ? anchor.top : below) - 2 * GAP;
    for (const [name, value] of Object.entries({ left, ...edge, maxHeight: room })) {
      this.#root.style[name] = `${value}px`;
    }
  }

  #show() {
    this.#found = search(this.#input.value, this.#names);
    this.#list.replaceChildren();
    this.#list.scrollTop = 0;
    this.#grow();
    this.#activate(0);
    const all = this.#names.length;
    this.#count.textContent = this.#found.length === all ? `${all} LoRAs` : `${this.#found.length} of ${all} LoRAs`;
  }

  /** Makes more options once the last one is near. */
  #grow(upTo = 0) {
    const { scrollTop, clientHeight, scrollHeight, childElementCount: made } = this.#list;
    if (made && upTo < made && scrollTop + 2 * clientHeight < scrollHeight) return;
    this.#list.append(...this.#found.slice(made, made + CHUNK).map((each, index) => this.#option(each, made + index)));
  }

  #option({ name, at }, index) {
    const { folder, file } = split(name);
    const properties = { id: `lora_ops_option_${index}`, className: "option", role: "option", title: name };
    const option = element("div", { ...properties, "aria-selected": "false" });
    if (folder) option.append(element("span", { className: "folder" }, ...marked(folder, at, 0)));
    option.append(element("span", { className: "file" }, ...marked(file, at, folder.length)));
    option.addEventListener("pointermove", () => this.#activate(index, false));
    option.addEventListener("click", () => this.#choose(index));
    return option;
  }

  #activate(index, reveal = true) {
    this.#list.children[this.#active]?.setAttribute("aria-selected", "false");
    this.#active = Math.max(0, Math.min(index, this.#found.length - 1));
    this.#grow(this.#active + 1);
    const option = this.#list.children[this.#active];
    option?.setAttribute("aria-selected", "true");
    this.#input.setAttribute("aria-activedescendant", option?.id ?? "");
    if (reveal) option?.scrollIntoView({ block: "nearest" });
  }

  #choose(index) {
    const found = this.#found[index];
    if (!found || this.#end.signal.aborted) return;
    this.close();
    this.#told.picked(found.name);
  }

  #key(event) {
    const page = Math.max(1, Math.floor(this.#list.clientHeight / 26) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
    if (event.key in moves) this.#activate(this.#active + moves[event.key]);
    else if (event.key === "Enter") this.#filled.then(() => this.#choose(this.#active)); // fast fingers
    else if (event.key === "Escape" || event.key === "Tab") this.close();
    else return;
    event.preventDefault();
  }
}

/** A text's letters, those at the places in bold. */
function marked(text, places, start) {
  let place = start;
  return [...text].map((letter) => {
    const found = places.has(place);
    place += letter.length;
    return found ? element("b", {}, letter) : letter;
  });
}
