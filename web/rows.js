/** The rows of a LoRA stack: to and from the text that a workflow holds, and what is told of them. Knows no page. */

const VERSION = 1;
const NUMBER = /^\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*$/i; // as on the server
const DECIMAL_COMMA = /^(\s*[+-]?\d*),(\d{1,2}\s*)$/; // with more digits it may part thousands
const TAG = /<lora:([^<>:]+)(?::([^<>:]*))?(?::([^<>:]*))?>/g;
const EXTENSION = ".safetensors";

/** Why a text has no rows to show, for its reader. */
export class StackTextError extends Error {}

/**
 * The rows of a stack's text, in the grammar of lora_ops/stack.py. A row is {lora, on, strength, clip} (clip is null
 * where it follows strength) and whatever other fields it had. Throws a StackTextError rather than lose anything.
 */
export function parse(text) {
  const start = text.trimStart()[0];
  if (start === undefined) return [];
  return start === "{" || start === "[" ? fromJson(text) : fromTags(text);
}

/** The canonical text of rows. */
export function serialise(rows) {
  return rows.length ? JSON.stringify({ version: VERSION, rows: rows.map(written) }) : "";
}

/** A stack's text for reading: JSON with a line for each row, anything else as it stands. */
export function tidy(text) {
  if (text.trimStart()[0] !== "{") return text;
  const rows = parse(text).map((row) => JSON.stringify(written(row)));
  return `{"version":${VERSION},"rows":[\n${rows.join(",\n")}\n]}`;
}

function written({ lora, on, strength, clip, ...others }) {
  return { lora, on, strength, ...(clip === null ? {} : { clip }), ...others };
}

function fromJson(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new StackTextError(`This is no valid JSON: ${error.message}.`);
  }
  if (value?.version !== VERSION || !Array.isArray(value.rows) || Object.keys(value).length !== 2) {
    throw new StackTextError(`This should be {"version": ${VERSION}, "rows": [...]}.`);
  }
  if (namesIn(text) !== fieldsOf(value)) throw new StackTextError("This gives a field twice: keep one of them.");
  return value.rows.map((row, index) => fromObject(row, `Row ${index + 1}`));
}

function fromObject(row, which) {
  if (typeof row?.lora !== "string" || !row.lora.trim()) throw new StackTextError(`${which} names no LoRA.`);
  const { lora, on = true, strength = 1, clip = null, ...others } = row;
  if (typeof on !== "boolean") throw new StackTextError(`${which}: "on" should be true or false.`);
  for (const [field, value] of Object.entries({ strength, clip: clip ?? 0, start: others.start ?? 0, end: others.end ?? 1 }))
    if (!Number.isFinite(value)) throw new StackTextError(`${which}: "${field}" should be a number.`);
  return { lora, on, strength, clip, ...others };
}

/** How many field names a JSON text has; JSON.parse keeps only the last of two that are alike. */
function namesIn(text) {
  return [...text.matchAll(/"(?:[^"\\]|\\.)*"(\s*:)?/g)].filter((match) => match[1]).length;
}

function fieldsOf(value) {
  if (typeof value !== "object" || value === null) return 0;
  const own = Array.isArray(value) ? 0 : Object.keys(value).length;
  return Object.values(value).reduce((sum, each) => sum + fieldsOf(each), own);
}

function fromTags(text) {
  const rest = text.replace(TAG, "").replace(/^[\s,]+|[\s,]+$/g, "");
  if (rest) throw new StackTextError(`This is no <lora:name:strength> tag: ${rest.slice(0, 60)}`);
  return [...text.matchAll(TAG)].map(([tag, name, strength, clip]) => ({
    lora: name.trim(),
    on: true,
    strength: strength ? numberIn(strength, tag) : 1,
    clip: clip ? numberIn(clip, tag) : null,
  }));
}

function numberIn(text, tag) {
  const value = number(text);
  if (value === null) throw new StackTextError(`A strength of ${tag} is no number.`);
  return value;
}

function number(text) {
  return NUMBER.test(text) && Number.isFinite(Number(text)) ? Number(text) : null;
}

/** The number that somebody typed, perhaps with a decimal comma; null for what is none or may be two. */
export function typed(text) {
  return number(text.replace(DECIMAL_COMMA, "$1.$2"));
}

/** A value moved by so many steps, without the dust of binary fractions. */
export function moved(value, steps, step) {
  return Number((value + steps * step).toFixed(3));
}

/** How far a drag by one pixel or a press of an arrow key goes. */
export function stepFor({ shiftKey, ctrlKey, metaKey }) {
  return shiftKey ? 0.001 : ctrlKey || metaKey ? 0.1 : 0.01;
}

/** A strength for its field: two decimals, or up to four where it has them. */
export function format(value) {
  const short = value.toFixed(2);
  return Number(short) === value ? short : String(Number(value.toFixed(4)));
}

/** A name's folder (with its slash) and file, without the extension. */
export function split(name) {
  const path = posix(name);
  const at = path.lastIndexOf("/") + 1;
  const file = path.slice(at);
  return { folder: path.slice(0, at), file: file.endsWith(EXTENSION) ? file.slice(0, -EXTENSION.length) : file };
}

function posix(name) {
  return name.replaceAll("\\", "/");
}

function base(name) {
  return name.slice(name.lastIndexOf("/") + 1);
}

/** Without case (by way of capitals: ß is SS), and with accents as one character. */
function folded(name) {
  return name.toUpperCase().toLowerCase().normalize("NFC");
}

const WAYS = [(name) => name, folded, base, (name) => folded(base(name))];

/**
 * What finds a name of this or another machine among the server's, by the WAYS of nodes/host/names.py: the names it
 * may mean, exactly one where the server will find the file without its sha256.
 */
export function finder(names) {
  const known = new Set(names.map(posix));
  const ways = WAYS.map((way) => [way, Map.groupBy(known, way)]);
  return (name) => {
    const wanted = posix(name.trim()).replace(/^\/+|\/+$/g, "");
    const tries = ways.flatMap(([way, meant]) => [wanted, wanted + EXTENSION].map((each) => meant.get(way(each))));
    return tries.find(Boolean) ?? [];
  };
}

/** A text of selectors in one line: the server takes commas for newlines. */
export function oneLine(blocks) {
  return blocks.trim().replace(/[\s,]*\n[\s,]*/g, ", ");
}

/** The names that a query fits, best first: each {name, at}, where at are the places of the letters it found. */
export function search(query, names) {
  const tokens = query.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (const name of names.map(posix)) {
    const sought = name.toLowerCase().replace(/\.safetensors$/, "");
    const matches = tokens.map((token) => match(token, sought));
    if (matches.includes(null)) continue;
    const score = matches.reduce((sum, each) => sum + each.score, 0);
    found.push({ name, score, at: new Set(matches.flatMap((each) => each.at)) });
  }
  if (tokens.length) found.sort((a, b) => b.score - a.score || a.name.length - b.name.length);
  return found;
}

/** A token in one piece, best at the start of a word of the file's own name; else its letters in order. */
function match(token, name) {
  const file = name.lastIndexOf("/") + 1;
  const score = (at) => 4 * (at >= file) + 2 * (at === 0 || /[^a-z0-9]/.test(name[at - 1])) + (at === file);
  const whole = places(token, name).sort((a, b) => score(b) - score(a));
  if (whole.length) return { score: 1 + score(whole[0]), at: span(whole[0], token.length) };
  const at = [];
  for (const letter of token) {
    const next = name.indexOf(letter, at.length ? at.at(-1) + 1 : 0);
    if (next < 0) return null;
    at.push(next);
  }
  return { score: (token.length - 1 - (at.at(-1) - at[0])) / name.length, at }; // 0 at best
}

function places(token, name) {
  const found = [];
  for (let at = name.indexOf(token); at >= 0; at = name.indexOf(token, at + 1)) found.push(at);
  return found;
}

function span(start, length) {
  return Array.from({ length }, (_, index) => start + index);
}

/**
 * For each row what a receipt tells of it, or null. Rows that are off have no line in a receipt, rows of a connected
 * stack come first in it, and a row may have been edited since: from the last to the first, a row takes the last line
 * of its file. find(row) is the names it may mean; a line knows by which name its file was asked for.
 */
export function landings(rows, receipt, find) {
  const left = [...receipt.rows];
  const takeLast = (row) => {
    const [name, another] = find(row) ?? [];
    const fits = (line) => line.asked === row.lora.trim() || (!another && posix(line.lora) === name);
    const at = row.on ? left.findLastIndex(fits) : -1;
    return at < 0 ? null : left.splice(at, 1)[0];
  };
  return rows.map((row) => row).reverse().map(takeLast).reverse();
}

/** A receipt's line in a few letters, and in full. */
export function told(line) {
  const { matched, total } = line;
  const unused = Object.keys(line.blocks).filter((selector) => !line.blocks[selector]);
  const good = matched === total && matched > 0 && !unused.length;
  const shown = Object.entries(line.parts).filter(([, each]) => each.total);
  const parts = shown.map(([part, each]) => `${part} ${each.matched}/${each.total}`);
  const full = [`${matched} of ${total} modules landed${parts.length ? ` (${parts.join(", ")})` : ""}`];
  for (const [part, count] of Object.entries(line.unconnected)) full.push(`${count} for ${part}, which is not connected`);
  for (const { count, reason } of line.refused) full.push(`${count} refused: ${reason}`);
  for (const selector of unused) full.push(`${selector} touches no module`);
  if (line.idle) full.push(`${line.idle} of the landed are all zero`);
  return { good, short: good ? `✓ ${matched}` : `! ${matched}/${total}`, full };
}

/** What the server tells of a file, in lines. */
export function about(info) {
  if (!info) return [];
  const ranks = typeof info.rank === "object" && info.rank ? Object.keys(info.rank).join(", ") : info.rank;
  const kind = [info.family, ranks && `rank ${ranks}`].filter(Boolean).join(", ");
  const words = info.trigger_words?.length ? `trigger words: ${info.trigger_words.join(", ")}` : "";
  return [kind, words].filter(Boolean);
}
