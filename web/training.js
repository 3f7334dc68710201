/** A training run on its node: how it goes, its chart and samples, and what can be asked of it. */

import { Curve, said } from "./curve.js";
import { element } from "./dom.js";
import { addBelow, ask, redraw, runOf, sampleAddress } from "./host.js";
import { duration, last, line, loss, merged, size, speed, upTo } from "./history.js";
import { Strip } from "./samples.js";

const NAME = "lora_ops_training";
const CHART = 150; // px that the chart has at least; a taller node gives it more
const LOG = "lora_ops.log_loss"; // where the browser keeps whether the scale is logarithmic
const BUTTONS = {
  sample: ["Sample now", "Sampling…", "Draw the samples with what has been learned so far, after this step"],
  save: ["Save now", "Saving…", "Save what has been learned so far, after this step"],
  finish: ["Finish and keep", "Finishing…", "End after this step and hand on what has been learned"],
};
const STATES = {
  running: "Training",
  done: "Done",
  finished: "Finished early",
  cancelled: "Cancelled",
  failed: "Failed",
  stopped: "Stopped",
};
const panels = new WeakMap(); // node -> its Panel

/** Shows on a node what a run of it has told. */
export function follow(node, news) {
  if (!panels.has(node)) panels.set(node, new Panel(node));
  panels.get(node).told(news);
}

class Panel {
  #run = null;
  #loading = false;
  #missing = null; // a run that there is more of than is known
  #step = null; // that is looked at
  #refused = ""; // why the server did not do what was asked
  #log = readLog();
  #said = "";

  #state = element("span", { className: "state", role: "status" });
  #figures = element("span", { className: "figures" });
  #done = element("div", { className: "done", role: "progressbar", "aria-label": "Steps", "aria-valuemin": 0 });
  #readings = {
    loss: reading("raw", "loss"),
    smoothed: reading("smoothed", "smoothed"),
    validation: reading("validation", "validation"),
  };
  #scale = element("button", { type: "button", className: "scale", title: "Logarithmic scale" }, "log");
  #curve = new Curve((step) => this.#look(step));
  #strip;
  #spoken = element("div", { className: "spoken", "aria-live": "polite" });
  #note = element("div", { className: "note", role: "status" });
  #buttons;
  #root;

  constructor(node) {
    const address = (step, number, at, small) => sampleAddress(this.#run.run, step, number, at, small);
    this.#strip = new Strip(address, (step) => this.#curve.look(step));
    this.#buttons = Object.fromEntries(Object.keys(BUTTONS).map((want) => [want, this.#button(want)]));
    const readings = Object.values(this.#readings).map(({ element }) => element);
    const head = element(
      "div",
      { className: "head" },
      element("div", { className: "line" }, this.#state, this.#figures),
      this.#done,
      element("div", { className: "legend" }, ...readings, this.#scale),
    );
    const buttons = element("div", { className: "buttons" }, ...Object.values(this.#buttons));
    const foot = element("div", { className: "foot" }, this.#strip.element, this.#note, buttons);
    this.#root = element("div", { className: NAME, role: "group" }, head, this.#curve.element, foot, this.#spoken);
    this.#scale.setAttribute("aria-pressed", String(this.#log));
    this.#scale.addEventListener("click", () => this.#toggleLog());
    addBelow(node, NAME, this.#root);
    const fit = new ResizeObserver(() => {
      const height = `${head.offsetHeight + CHART + foot.offsetHeight}px`;
      if (this.#root.style.minHeight === height) return;
      this.#root.style.minHeight = height;
      redraw(node);
    });
    fit.observe(head);
    fit.observe(foot);
  }

  told(news) {
    const found = merged(this.#run, news);
    if (found === null) this.#load(news);
    else if (found !== this.#run) this.#show(found);
  }

  /** Asks the server for what is missing before some news, until nothing is. */
  async #load({ run, began }) {
    this.#missing = { run, began };
    if (this.#loading) return;
    this.#loading = true;
    while (this.#missing) {
      const asked = this.#missing;
      this.#missing = null;
      const same = this.#run?.run === asked.run && this.#run.began === asked.began;
      const news = await runOf(asked.run, same ? last(this.#run) : 0);
      const found = news && merged(this.#run, news);
      if (found) this.#show(found);
    }
    this.#loading = false;
  }

  #show(run) {
    if (run.step !== this.#run?.step || run.state !== this.#run.state) this.#refused = "";
    this.#run = run;
    const [root, running] = [this.#root, run.state === "running"];
    root.dataset.state = run.state;
    root.setAttribute("aria-label", `Training of ${run.name}`);
    put(this.#state, running && run.doing ? `${run.doing[0].toUpperCase()}${run.doing.slice(1)}…` : STATES[run.state]);
    this.#figures.replaceChildren(...figures(run));
    this.#figures.title = line(run);
    this.#done.style.setProperty("--share", run.steps ? Math.min(1, run.step / run.steps) : 0);
    this.#done.setAttribute("aria-valuemax", run.steps);
    this.#done.setAttribute("aria-valuenow", run.step);
    this.#curve.show(run, this.#log);
    this.#strip.show(run.samples);
    for (const [want, button] of Object.entries(this.#buttons)) {
      const heard = run.asked.includes(want);
      button.disabled = !running || heard;
      button.setAttribute("aria-busy", String(heard));
      put(button, BUTTONS[want][heard ? 1 : 0]);
    }
    this.#read();
    this.#say();
  }

  /** The values at the step that is looked at, or the last ones. */
  #look(step) {
    this.#step = step;
    this.#root.classList.toggle("looking", step !== null);
    this.#read();
  }

  #read() {
    const run = this.#run;
    const point = this.#step === null ? run.points.at(-1) : upTo(run.points, this.#step);
    const validation = this.#step === null ? run.validations.at(-1) : upTo(run.validations, this.#step);
    this.#readings.loss.show(point?.[1]);
    this.#readings.smoothed.show(point?.[2]);
    this.#readings.validation.show(validation?.[1]);
    this.#readings.validation.element.hidden = !run.validations.length;
    const { element: chart } = this.#curve;
    const read = this.#step !== null && chart === document.activeElement; // with the keys
    const values = Object.values(this.#readings).filter((each) => !each.element.hidden);
    put(this.#spoken, read ? [said(run, this.#step), ...values.map((each) => each.element.textContent)].join(", ") : "");
  }

  #say() {
    const run = this.#run;
    const lines = [
      ["bad", this.#refused],
      ["bad", run.trouble],
      [run.state === "failed" ? "bad" : "", run.message],
      ["", run.state === "stopped" ? "The server ended while it ran. Queue the node again to go on." : ""],
      ["", run.state === "running" ? run.note : ""],
    ];
    const shown = lines.filter(([, text]) => text);
    if (JSON.stringify(shown) === this.#said) return;
    this.#said = JSON.stringify(shown);
    this.#note.replaceChildren(...shown.map(([className, text]) => element("div", { className }, text)));
  }

  #button(want) {
    const [label, , title] = BUTTONS[want];
    const press = async () => {
      button.disabled = true;
      this.#refused = await ask(this.#run.run, want);
      if (this.#refused) button.disabled = this.#run.state !== "running";
      this.#say();
    };
    const properties = { type: "button", className: want, title, disabled: true, onclick: press };
    const button = element("button", { ...properties, "data-want": want }, label);
    return button;
  }

  #toggleLog() {
    this.#log = !this.#log;
    keepLog(this.#log);
    this.#scale.setAttribute("aria-pressed", String(this.#log));
    this.#curve.show(this.#run, this.#log);
  }
}

function figures(run) {
  const steps = element("span", { className: "steps" }, element("b", {}, String(run.step)), `/${run.steps} steps`);
  const told = [];
  if (run.state !== "running") told.push(`in ${duration(run.seconds)}`);
  else if (run.speed) told.push(speed(run.speed), `${duration(run.left)} left`);
  if (run.memory) told.push(size(run.memory));
  return [steps, ...told.flatMap((each) => [" ", element("span", {}, each)])]; // the space is heard, not seen
}

/** A value beside its line's colour. */
function reading(kind, name) {
  const value = element("b", {}, "–");
  const found = element("span", { className: `reading ${kind}` }, element("i"), `${name} `, value);
  return { element: found, show: (number) => put(value, loss(number)) };
}

/** Text that is the same is not put there again: a screen reader would read it again. */
function put(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

function readLog() {
  try {
    return localStorage.getItem(LOG) === "true";
  } catch {
    return false; // a browser that keeps nothing
  }
}

function keepLog(log) {
  try {
    localStorage.setItem(LOG, String(log));
  } catch {
    // it is as it was when the page is loaded again
  }
}
