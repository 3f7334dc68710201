/** The extension: whatever our nodes tell of a run is shown on them as a receipt. */

import { watchRuns } from "./host.js";
import { expire, show, style } from "./receipt.js";

style();
watchRuns({ told: show, begun: expire });
