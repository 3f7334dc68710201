/** The host's front end: everything of it that this pack touches. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const PREFIX = "LoraOps"; // of every node id of ours
const WIDTH = 440; // px of a new node: what most lines of a receipt need, and a row of a stack

/**
 * Calls begun(node) when a run begins, told(node, text, json) when one of our nodes has told something in it and
 * failed(node, type, message) when one has failed.
 *
 * The host tells again what it has cached, at the end of a run. What comes with a workflow (another tab, the
 * history) is from an earlier run: told, then begun.
 */
export function watchRuns({ begun, told, failed }) {
  app.registerExtension({
    name: "lora_ops.receipt",

    nodeCreated(node) {
      if (!isOurs(node)) return;
      node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
      chain(node, "onExecutionStart", () => begun(node));
      chain(node, "onExecuted", (output) => pass(node, output));
    },

    onNodeOutputsUpdated(outputs) {
      for (const [locator, output] of Object.entries(outputs)) {
        const node = nodeAt(locator);
        if (isOurs(node) && pass(node, output)) begun(node);
      }
    },
  });
  api.addEventListener("execution_error", ({ detail }) => {
    const node = nodeOfRun(String(detail.node_id), app.rootGraph);
    if (!isOurs(node) || node.constructor.comfyClass !== detail.node_type) return; // of another tab's workflow
    failed(node, detail.exception_type, detail.exception_message.trim());
  });

  function pass(node, output) {
    const [text, json] = [output?.text?.[0], output?.lora_ops?.[0]];
    if (json === undefined) return false;
    told(node, text, json);
    return true;
  }
}

/**
 * Draws the inputs that ask for this type of widget with editors: make(node, page) returns one, which has an element
 * (its style.minHeight makes the node grow), a value (a text) that is saved and sent in its place, fixed where more
 * height is of no use, and wired, which is set when the value comes over a wire. page is what the editor may ask and
 * tell. refreshed(node) hears that the user had the server's files listed again.
 */
export function drawInputs(type, make, refreshed) {
  app.registerExtension({
    name: `lora_ops.${type}`,
    getCustomWidgets: () => ({ [type]: (node, name, spec) => ({ widget: addEditor(node, name, type, make, spec[1]) }) }),
    loadedGraphNode: (node) => isOurs(node) && node.widgets.forEach((each) => each.element && takePlace(node, each.element)),
    refreshComboInNodes: () => everyNode().filter(isOurs).forEach(refreshed),
  });
}

function addEditor(node, name, type, make, { default: value = "" }) {
  const editor = make(node, {
    names: listLoras,
    info: describeLora,
    changed: () => {
      widget.callback?.(editor.value);
      redraw(node);
    },
    settled: () => app.extensionManager.workflow.activeWorkflow?.changeTracker?.captureCanvasState(),
    redrawn: () => {
      resize(node, 0);
      redraw(node);
    },
    resized: (change) => resize(node, change),
  });
  const getMinHeight = () => parseFloat(editor.element.style.minHeight) + 2 * widget.margin;
  const widget = node.addDOMWidget(name, type, editor.element, {
    hideInPanel: true,
    getMinHeight,
    getMaxHeight: () => (editor.fixed ? getMinHeight() : undefined),
    getValue: () => editor.value,
    setValue: (text) => (editor.value = typeof text === "string" ? text : JSON.stringify(text)), // an object of an API's user
  });
  widget.value = value;
  const wire = () => (editor.wired = Boolean(node.inputs?.some((slot) => slot.widget?.name === name && slot.link != null)));
  chain(node, "onConnectionsChange", wire);
  chain(node, "onConfigure", wire);
  chain(node, "onResize", () => redraw(node)); // the host resizes while it draws, too late for that frame
  letTextBeUsed(editor.element);
  return widget;
}

/**
 * Calls told(node, news) with what the server tells of training runs that were begun by a node of this workflow: while
 * they run, and when a workflow is loaded or the server is back.
 */
export function watchTraining(told) {
  const tell = (news) => {
    const node = news.workflow === app.rootGraph?.id && nodeOfRun(news.node, app.rootGraph);
    if (isOurs(node)) told(node, news);
  };
  const refresh = async () => {
    const answer = await asked(`/lora_ops/train?${new URLSearchParams({ workflow: app.rootGraph.id })}`);
    const newest = new Map((answer?.runs ?? []).reverse().map((run) => [run.node, run]));
    for (const { run } of newest.values()) {
      const news = await runOf(run, 0);
      if (news) tell(news);
    }
  };
  app.registerExtension({ name: "lora_ops.training", afterConfigureGraph: () => void refresh() });
  api.addEventListener("lora_ops.train", ({ detail }) => tell(detail));
  api.addEventListener("reconnected", refresh);
}

/** What the server tells of a run after a step, null where it does not. */
export function runOf(run, since) {
  return asked(`/lora_ops/train/${run}?since=${since}`);
}

export function sampleAddress(run, step, number, at, small) {
  return api.apiURL(`/lora_ops/train/${run}/sample/${step}/${number}?at=${at}${small ? "&small" : ""}`);
}

/** Asks a run to sample, save or finish after its step; returns why it does not, or "". */
export async function ask(run, want) {
  const headers = { "Content-Type": "application/json" };
  try {
    const answer = await api.fetchApi(`/lora_ops/train/${run}/${want}`, { method: "POST", headers, body: "{}" });
    if (answer.ok) return "";
    return await answer.json().then(({ error }) => error, () => `${answer.status} ${answer.statusText}`);
  } catch {
    return "The server does not answer.";
  }
}

async function asked(path) {
  try {
    const answer = await api.fetchApi(path);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** The names of the server's LoRA files. */
async function listLoras() {
  const answer = await api.fetchApi("/models/loras");
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

/** What the server tells of the LoRA file of this name or else of this sha256, null where it does not. */
function describeLora(name, sha256) {
  return asked(`/lora_ops/lora?${new URLSearchParams(sha256 ? { name, sha256 } : { name })}`);
}

/**
 * Puts an element below the node's widgets, in either renderer; its style.minHeight makes the node grow. It belongs
 * to the page alone: neither the saved workflow nor the prompt knows of it. Such a widget must be the last, or values
 * are restored to the wrong inputs.
 */
export function addBelow(node, name, element) {
  const getMinHeight = () => parseFloat(element.style.minHeight || 0) + 2 * widget.margin;
  const options = { serialize: false, hideInPanel: true, getMinHeight };
  const height = node.size[1]; // what is saved, or an empty place would stay where the element was
  const widget = node.addDOMWidget(name, name, element, options); // a type of our own: the host's have its own looks
  widget.serialize = false; // the workflow; options.serialize is the prompt
  chain(node, "onSerialize", ({ size }) => {
    if (widget.computedHeight <= getMinHeight()) size[1] = Math.min(size[1], height); // else the user made it taller
  });
  letTextBeUsed(element);
  takePlace(node, element);
}

/**
 * Nodes 2.0 goes on showing the element of a node that is gone where another has been loaded under its id (by undo, or
 * with another workflow): puts the new one there.
 */
function takePlace(node, element) {
  if (node.graph !== app.canvas.graph) return;
  const shown = document.querySelector(`[data-node-id="${node.id}"] .${element.classList[0]}`);
  if (shown && shown !== element) shown.replaceWith(element);
}

/** Not below what the host gives a node that it loads: growing then would be an edit, and undo would stay at it. */
function resize(node, change) {
  const height = Math.max(node.computeSize()[1], node.size[1] + change);
  if (height !== node.size[1]) node.setSize([node.size[0], height]);
}

export function redraw(node) {
  node.graph?.setDirtyCanvas(true, true);
}

/** Selecting and scrolling stay with the element; every other gesture goes to the canvas, as on the rest of a node. */
function letTextBeUsed(element) {
  element.addEventListener("pointerdown", (event) => {
    event.stopPropagation();
    if (event.button === 1) forward(event);
  });
  element.addEventListener("wheel", (event) => {
    event.stopPropagation();
    const box = event.target.closest("textarea") ?? element;
    const scrolls = box.scrollHeight > box.clientHeight && Math.abs(event.deltaY) > Math.abs(event.deltaX);
    if (!scrolls || event.ctrlKey || event.metaKey) forward(event);
  });
}

function forward(event) {
  event.preventDefault();
  app.canvas.canvas.dispatchEvent(new event.constructor(event.type, event));
}

function everyNode() {
  return [app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap((graph) => graph.nodes);
}

function isOurs(node) {
  return Boolean(node?.constructor.comfyClass?.startsWith(PREFIX));
}

/** The node at "3", or at "<uuid of a subgraph>:3". */
function nodeAt(locator) {
  const [id, subgraph] = locator.split(":").reverse();
  const graph = subgraph === undefined ? app.rootGraph : app.rootGraph.subgraphs.get(subgraph);
  return graph?.getNodeById(id);
}

/** The node at "3", or at "5:3" in the subgraph that node 5 stands for. */
function nodeOfRun(path, graph) {
  const [id, ...inner] = path.split(":");
  const node = graph?.getNodeById(id);
  return inner.length ? nodeOfRun(inner.join(":"), node?.subgraph) : node;
}

function chain(node, event, then) {
  const before = node[event];
  node[event] = function (...details) {
    before?.apply(this, details);
    then(...details);
  };
}
