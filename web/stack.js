/** The rows of a LoRA stack on its node, in place of the text that holds them. */

import { element } from "./dom.js";
import { NumberField } from "./number.js";
import { pick } from "./picker.js";
import { about, finder, landings, oneLine, parse, serialise, split, StackTextError, tidy, told } from "./rows.js";

const HEADER = 22; // px, all of them: the node's height is known before anything is drawn
const ROW = 26;
const DETAIL = 24;
const LINE = 15;
const ADD = 24;
const PADDING = 4; // above and below
const TEXT = 130; // of the text's field, at least
const RANGE = { start: 0, end: 1 }; // of sampling, where a row says nothing
const SHOWN = ["lora", "on", "strength", "clip", "blocks", "start", "end", "sha256"]; // sha256: in no form for people
const SPECIAL = ["blocks", "start", "end", "schedule"];

/**
 * The editor of a stack's text. value is that text: what it was given, to the letter, until the user edits a row.
 *
 * page is what it lives on: names() and info(name, sha256) ask the server, changed() hears that the value is another,
 * settled() that an edit is complete, resized(change) that an edit changed the height by so many px, redrawn() that
 * it looks otherwise for another reason.
 */
export class Stack {
  element = element("div", { className: "lora_ops_stack", tabIndex: -1 });
  #page;
  #text = "";
  #rows = [];
  #error = "";
  #asText = false;
  #find = null; // null until the server's names are known: till then no row is missing
  #byHash = new Map(); // what the server was asked -> the names it answered, null until it has
  #receipt = null;
  #stale = false;
  #open = new WeakSet(); // rows that show their details
  #infos = new WeakMap(); // row -> what the server told of its file
  #parts = new Map(); // row -> its element
  #lines = new Map(); // row -> its line of the receipt
  #height = 0;
  #later; // the timer of a drawing that waits

  constructor(page) {
    this.#page = page;
    for (const [name, value] of Object.entries({ HEADER, ROW, DETAIL, LINE, ADD, PADDING }))
      this.element.style.setProperty(`--${name.toLowerCase()}`, `${value}px`);
    this.element.addEventListener("paste", (event) => this.#paste(event));
    this.#render();
    this.refresh();
  }

  get value() {
    return this.#text;
  }

  set value(text) {
    this.#read(text);
    this.#render();
  }

  /** Whether the height that it needs is all that it can use. */
  get fixed() {
    return !this.#asText && !this.#error;
  }

  /** Asks the server for its files again. */
  async refresh() {
    const names = await this.#names().catch(() => null);
    if (!names) return;
    this.#byHash.clear();
    this.#update();
  }

  /** A text comes over a wire instead: what is here is not used. */
  set wired(wired) {
    this.element.inert = wired;
    this.element.classList.toggle("wired", wired);
    this.element.dataset.wired = wired ? "The connected text is used instead" : "";
  }

  /** Shows what a run told of each row. */
  landed(receipt) {
    this.#receipt = receipt;
    this.#stale = false;
    this.#update();
  }

  /** What is shown was told by an earlier run. */
  expire() {
    this.#stale = true;
    this.element.classList.add("expired");
  }

  #read(text) {
    this.#text = text;
    this.#error = "";
    try {
      this.#rows = parse(text);
    } catch (error) {
      if (!(error instanceof StackTextError)) throw error;
      this.#error = error.message;
      this.#rows = [];
    }
  }

  async #names() {
    const names = await this.#page.names();
    this.#find = finder(names);
    return names;
  }

  /** The names that a row may mean, null until that is known. */
  #meant(row) {
    const named = this.#find?.(row.lora) ?? null;
    if (!named || named.length === 1 || !row.sha256) return named;
    const asked = JSON.stringify([row.lora, row.sha256]);
    if (!this.#byHash.has(asked)) {
      this.#byHash.set(asked, null);
      this.#seek(row, asked, named);
    }
    return this.#byHash.get(asked);
  }

  async #seek({ lora, sha256 }, asked, named) {
    const info = await this.#page.info(lora, sha256);
    this.#byHash.set(asked, info ? [info.resolved] : named);
    this.#update();
  }

  /** An edit of rows, complete at once. */
  #edit(change) {
    change();
    this.#write();
    this.#render(true);
    this.#page.settled();
  }

  #write() {
    this.#text = serialise(this.#rows);
    this.#page.changed();
  }

  /** Draws what was learned meanwhile, once no hand is on it. */
  #update(byUser = false) {
    clearTimeout(this.#later);
    const busy = this.element.querySelector(":active, .dragging, .moving, input:focus, textarea:focus");
    if (busy) this.#later = setTimeout(() => this.#update(byUser), 300);
    else this.#render(byUser);
  }

  #render(byUser = false) {
    const focused = document.activeElement;
    const [row] = [...this.#parts].find(([, part]) => part.contains(focused)) ?? [];
    const part = this.element.contains(focused) ? focused.dataset.part : undefined;
    const at = [...this.#parts.keys()].indexOf(row);
    const lines = this.#receipt ? landings(this.#rows, this.#receipt, (each) => this.#meant(each)) : [];
    this.#lines = new Map(this.#rows.map((each, index) => [each, lines[index]]));
    this.#parts = new Map(this.#rows.map((each) => [each, this.#row(each)]));
    const list = element("div", { className: "list", role: "list" }, ...this.#parts.values());
    const body = this.fixed ? [list, this.#add()] : [this.#textField()];
    this.element.replaceChildren(this.#header(), ...body);
    this.element.classList.toggle("expired", this.#stale);
    if (part) this.#focus(this.#parts.has(row) ? row : this.#rows[Math.min(at, this.#rows.length - 1)], part);
    this.#fit(byUser);
  }

  #focus(row, part) {
    const among = this.#parts.get(row) ?? this.element;
    (among.querySelector(`[data-part="${part}"]`) ?? this.element).focus({ preventScroll: true });
  }

  #fit(byUser) {
    const heights = this.#rows.map((row) => ROW + (this.#open.has(row) ? 2 * DETAIL + LINE * this.#notes(row).length : 0));
    const rows = heights.reduce((sum, each) => sum + each, ADD);
    const height = HEADER + (this.fixed ? rows : Math.max(rows, TEXT)) + 2 * PADDING;
    const change = height - this.#height;
    this.#height = height;
    this.element.style.minHeight = `${height}px`;
    if (byUser && change) this.#page.resized(change);
    else this.#page.redrawn();
  }

  #header() {
    const on = this.#rows.filter((row) => row.on).length;
    const all = this.#rows.length;
    const checked = on === 0 ? "false" : on === all ? "true" : "mixed";
    const header = element("div", { className: "header" });
    if (this.fixed && all) {
      header.append(
        toggle("all", "All LoRAs on", checked, () => this.#edit(() => this.#rows.forEach((row) => (row.on = on < all)))),
        element("span", { className: "count" }, on === all ? `${all} on` : `${on} of ${all} on`),
        element("span", { className: "caption" }, "Model"),
        element("span", { className: "caption" }, "CLIP"),
      );
    } else {
      header.append(element("span", { className: "count" }, this.fixed ? "No LoRAs" : "As text"));
    }
    header.append(this.#textButton());
    return header;
  }

  #textButton() {
    const label = this.#error ? "The text has no rows to show" : this.#asText ? "Show as rows" : "Edit as text";
    const properties = { type: "button", className: "icon text", title: label, disabled: Boolean(this.#error) };
    return element("button", {
      ...properties,
      "aria-label": label,
      "aria-pressed": String(!this.fixed),
      "data-part": "text",
      onclick: () => {
        this.#asText = !this.#asText;
        this.#render(true);
        this.#focus(null, this.#asText ? "area" : "text");
      },
    });
  }

  #textField() {
    const problem = element("div", { className: "problem", role: "alert" }, this.#error);
    const area = element("textarea", {
      value: this.#error ? this.#text : tidy(this.#text),
      spellcheck: false,
      wrap: "off",
      placeholder: "<lora:style/ink:0.8>\n<lora:style/ink:0.8:0.6>",
      "aria-label": "The stack as text",
      "data-part": "area",
      oninput: () => {
        this.#read(area.value);
        this.#asText = true; // or a corrected text would turn into rows under the hand
        problem.textContent = this.#error;
        this.element.querySelector(".icon.text").disabled = Boolean(this.#error);
        this.#page.changed();
      },
      onchange: () => this.#page.settled(),
    });
    return element("div", { className: "field" }, area, problem);
  }

  #add() {
    const button = element("button", { type: "button", className: "add", "data-part": "add" }, "+ Add LoRA");
    button.addEventListener("click", () => {
      const picked = (lora) => {
        const row = { lora, on: true, strength: 1, clip: null };
        this.#edit(() => this.#rows.push(row));
        this.#ask(row);
      };
      this.#pick(button, { label: "Add a LoRA", picked });
    });
    return button;
  }

  #row(row) {
    const line = this.#lines.get(row);
    const { folder, file } = split(row.lora);
    const found = this.#meant(row);
    const missing = found && found.length !== 1;
    const info = this.#infos.get(row);
    const state = `${row.on ? "" : " off"}${missing ? " missing" : ""}${this.#open.has(row) ? " open" : ""}`;
    const strip = element("div", { className: "strip" });
    strip.append(
      this.#handle(row, file),
      toggle("on", `${file} on`, String(row.on), () => this.#edit(() => (row.on = !row.on))),
      this.#name(row, { folder, file, missing, found, info }),
      ...(missing ? [this.#replace(row, found)] : line ? [badge(line)] : []),
      ...this.#strengths(row, file),
      this.#more(row, file),
      icon("remove", `Remove ${file}`, () => this.#edit(() => this.#rows.splice(this.#rows.indexOf(row), 1))),
    );
    const part = element("div", { className: `row${state}`, role: "listitem" }, strip);
    if (this.#open.has(row)) part.append(this.#details(row));
    part.addEventListener("keydown", (event) => this.#key(event, row));
    return part;
  }

  #name(row, { folder, file, missing, found, info }) {
    const elsewhere = found && found[0] !== row.lora ? [`found as ${found[0]}`] : [];
    const title = [row.lora, ...(missing ? [unfound(found)] : [...elsewhere, ...about(info)])].join("\n");
    const button = element("button", { type: "button", className: "name", title, "data-part": "name" });
    button.append(element("span", { className: "folder" }, folder), element("span", { className: "file" }, file));
    button.setAttribute("aria-label", missing ? `${row.lora}, ${unfound(found)}: choose a replacement` : row.lora);
    button.setAttribute("aria-haspopup", "listbox");
    button.addEventListener("click", () => this.#choose(row, button, missing ? file : ""));
    return button;
  }

  #replace(row, found) {
    const { file } = split(row.lora);
    const properties = { type: "button", className: "replace", title: `${row.lora} ${unfound(found)}` };
    const button = element("button", { ...properties, "data-part": "replace" }, "Replace…");
    button.addEventListener("click", () => this.#choose(row, button, file));
    return button;
  }

  #choose(row, anchor, query) {
    const picked = (lora) => {
      if (lora === row.lora) return;
      this.#edit(() => {
        row.lora = lora;
        delete row.sha256; // the other file's
      });
      this.#ask(row);
    };
    this.#pick(anchor, { label: `Replace ${row.lora}`, query, picked });
  }

  #pick(anchor, asked) {
    const { part } = anchor.dataset;
    const row = [...this.#parts].find(([, each]) => each.contains(anchor))?.[0];
    const pasted = (text) => this.#append(text);
    pick(anchor, this.#names(), { ...asked, pasted, closed: () => this.#focus(row, part) });
  }

  /** Asks the server about a row's file; its sha256 is kept in the row, so that the file is found under another name. */
  async #ask(row) {
    const name = row.lora;
    const info = await this.#page.info(name);
    if (!info || !this.#rows.includes(row) || row.lora !== name) return;
    this.#infos.set(row, info);
    if (info.sha256 && row.sha256 !== info.sha256 && !this.#asText) {
      row.sha256 = info.sha256;
      this.#write();
    }
    this.#update();
  }

  /** Nothing here draws the rows anew: a click that ends the typing of a number would find nothing under it. */
  #strengths(row, file) {
    const settled = () => this.#page.settled();
    const shown = () => {
      const follows = row.clip === null;
      clip.show(row.clip ?? row.strength);
      clip.element.classList.toggle("follows", follows);
      link.setAttribute("aria-pressed", String(follows));
      link.title = follows ? "CLIP follows the model: click to set it apart" : "CLIP is set apart: click to follow again";
    };
    const set = (field) => (value) => {
      row[field] = value;
      shown();
      this.#write();
    };
    const follow = () => {
      set("clip")(null);
      settled();
    };
    const label = (part) => `${part} strength of ${file}`;
    const given = { part: "clip", label: label("CLIP"), set: set("clip"), done: settled, clear: follow };
    const clip = new NumberField(row.clip ?? row.strength, given);
    const model = new NumberField(row.strength, { part: "model", label: label("Model"), set: set("strength"), done: settled });
    const link = icon("link", `CLIP strength of ${file} follows the model`, () => {
      if (row.clip !== null) return follow();
      set("clip")(row.strength);
      settled();
    });
    shown();
    return [model.element, link, clip.element];
  }

  #more(row, file) {
    const open = this.#open.has(row);
    const button = icon("more", `${open ? "Less" : "More"} of ${file}: blocks, start and end, receipt`, () => {
      if (open) this.#open.delete(row);
      else this.#open.add(row);
      this.#render(true);
      if (!open && !this.#infos.has(row)) this.#learn(row);
    });
    button.setAttribute("aria-expanded", String(open));
    button.classList.toggle("set", SPECIAL.some((field) => field in row));
    return button;
  }

  /** What the server tells of a row's file, for reading only. */
  async #learn(row) {
    const info = await this.#page.info(row.lora, row.sha256);
    if (!info) return;
    this.#infos.set(row, info);
    this.#update(true);
  }

  #details(row) {
    const { file } = split(row.lora);
    const set = (field, nothing) => (value) => {
      if (value === nothing) delete row[field];
      else row[field] = value;
      const more = this.#parts.get(row).querySelector(".more");
      more.classList.toggle("set", SPECIAL.some((each) => each in row));
      this.#write();
    };
    const settled = () => this.#page.settled();
    const other = !["string", "undefined"].includes(typeof row.blocks);
    const blocks = element("input", {
      type: "text",
      className: "blocks",
      value: other ? JSON.stringify(row.blocks) : oneLine(row.blocks ?? ""),
      disabled: other,
      spellcheck: false,
      placeholder: "all",
      "aria-label": `Blocks of ${file}`,
      "data-part": "blocks",
      onchange: () => {
        set("blocks", "")(blocks.value.trim());
        settled();
      },
      onkeydown: (event) => {
        event.stopPropagation();
        if (event.key !== "Enter") return;
        event.preventDefault(); // or the button would be pressed that has the focus now
        this.#focus(row, "more");
      },
    });
    const range = Object.entries(RANGE).flatMap(([field, nothing]) => {
      const label = `${file}: ${field}, from 0 (noise) to 1 (done)`;
      const given = { part: field, label, set: set(field, nothing), done: settled, min: 0, max: 1 };
      return [element("span", { className: "label" }, field), new NumberField(row[field] ?? nothing, given).element];
    });
    const copy = element("button", { type: "button", className: "plain", "data-part": "duplicate" }, "Duplicate");
    copy.addEventListener("click", () => {
      const twin = structuredClone(row);
      this.#edit(() => this.#rows.splice(this.#rows.indexOf(row) + 1, 0, twin));
    });
    return element(
      "div",
      { className: "details" },
      element("div", { className: "detail" }, element("span", { className: "label" }, "blocks"), blocks),
      element("div", { className: "detail" }, ...range, element("span", { className: "space" }), copy),
      ...this.#notes(row).map((text) => element("div", { className: "line", title: text }, text)),
    );
  }

  /** What else there is to say of a row. */
  #notes(row) {
    const line = this.#lines.get(row);
    const others = Object.entries(row).filter(([name]) => !SHOWN.includes(name));
    return [
      ...(line ? told(line).full : []),
      ...about(this.#infos.get(row)),
      ...others.map(([name, value]) => `${name}: ${JSON.stringify(value)}`),
    ];
  }

  #key(event, row) {
    const at = this.#rows.indexOf(row);
    const to = at + { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (event.altKey && to in this.#rows) this.#move(row, to);
    else if (event.key === "Delete" && event.target.tagName !== "INPUT") this.#edit(() => this.#rows.splice(at, 1));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #move(row, to) {
    this.#edit(() => {
      this.#rows.splice(this.#rows.indexOf(row), 1);
      this.#rows.splice(to, 0, row);
    });
  }

  /** A row follows the pointer and the others make way; nothing is written before it is let go. */
  #handle(row, file) {
    const handle = icon("handle", `Move ${file}: drag, or Alt with the arrow keys`, () => {});
    handle.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      const parts = [...this.#parts.values()];
      const from = this.#rows.indexOf(row);
      const boxes = parts.map((part) => part.getBoundingClientRect());
      const scale = boxes[from].height / parts[from].offsetHeight || 1; // of the canvas
      let to = from;
      handle.setPointerCapture(event.pointerId);
      parts[from].classList.add("moving");
      handle.onpointermove = (move) => {
        const shift = move.clientY - event.clientY;
        const passed = (box, index) => {
          const middle = (box.top + box.bottom) / 2;
          return index > from ? boxes[from].bottom + shift > middle : index < from && boxes[from].top + shift >= middle;
        };
        to = boxes.filter(passed).length;
        parts.forEach((part, index) => {
          const way = index > from && index <= to ? -1 : index < from && index >= to ? 1 : 0;
          const px = index === from ? shift : way * boxes[from].height;
          part.style.transform = px ? `translateY(${px / scale}px)` : "";
        });
      };
      handle.onlostpointercapture = () => {
        handle.onpointermove = handle.onlostpointercapture = null;
        parts.forEach((part) => (part.style.transform = ""));
        parts[from].classList.remove("moving");
        if (to !== from) this.#move(row, to);
      };
    });
    return handle;
  }

  #paste(event) {
    if (event.target.matches("input, textarea") || !this.#append(event.clipboardData.getData("text"))) return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Appends the rows of a text, if it has some. */
  #append(text) {
    if (!text.includes("<lora:") && !text.trimStart().startsWith("{")) return false;
    let rows;
    try {
      rows = parse(text);
    } catch (error) {
      if (!(error instanceof StackTextError)) throw error;
      return false;
    }
    this.#edit(() => this.#rows.push(...rows));
    return true;
  }
}

function unfound(found) {
  return found.length ? `is in ${found.length} folders of models/loras` : "is not in models/loras";
}

function badge(line) {
  const { good, short, full } = told(line);
  const properties = { className: `badge ${good ? "good" : "bad"}`, title: full.join("\n"), role: "img" };
  return element("span", { ...properties, "aria-label": full.join("; ") }, short);
}

function toggle(part, label, checked, flip) {
  const properties = { type: "button", className: "toggle", title: label, role: part === "all" ? "checkbox" : "switch" };
  return element("button", { ...properties, "aria-label": label, "aria-checked": checked, "data-part": part, onclick: flip });
}

function icon(part, label, press) {
  const properties = { type: "button", className: `icon ${part}`, title: label, onclick: press };
  return element("button", { ...properties, "aria-label": label, "data-part": part });
}
