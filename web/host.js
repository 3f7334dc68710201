/** The host's front end: everything of it that this pack touches. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const PREFIX = "LoraOps"; // of every node id of ours
const WIDTH = 400; // px of a new node: what most lines of a receipt need

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
    const scrolls = element.scrollHeight > element.clientHeight && Math.abs(event.deltaY) > Math.abs(event.deltaX);
    if (!scrolls || event.ctrlKey || event.metaKey) forward(event);
  });
}

function forward(event) {
  event.preventDefault();
  app.canvas.canvas.dispatchEvent(new event.constructor(event.type, event));
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
