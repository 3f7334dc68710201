/** The extension: a stack's text is drawn as rows, and what our nodes tell of a run, or why one failed, is shown, a
 * training while it goes on. */

import { style } from "./dom.js";
import { drawInputs, watchRuns, watchTraining } from "./host.js";
import { expire, fail, show } from "./receipt.js";
import { Stack } from "./stack.js";
import { follow } from "./training.js";

const stacks = new WeakMap(); // node -> its Stack

style("./receipt.css"); // before there is a receipt: text that is measured without its style makes a node too tall
style("./stack.css");
style("./training.css");

drawInputs(
  "LORA_OPS_STACK",
  (node, page) => {
    stacks.set(node, new Stack(page));
    return stacks.get(node);
  },
  (node) => stacks.get(node)?.refresh(),
);

watchRuns({
  told(node, text, json) {
    show(node, text, json);
    stacks.get(node)?.landed(JSON.parse(json));
  },
  failed: fail,
  begun(node) {
    expire(node);
    stacks.get(node)?.expire();
  },
});

watchTraining(follow);
