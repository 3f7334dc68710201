/** The extension: what our nodes tell of a run, or why one failed, is shown on them. */

import { watchRuns } from "./host.js";
import { expire, fail, show, style } from "./receipt.js";

style();
watchRuns({ told: show, failed: fail, begun: expire });
