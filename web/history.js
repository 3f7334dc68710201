/** What a page knows of a training run, how news joins it, and its numbers as people read them. Nothing of a page. */

const MOST = 4000; // points that are kept

/**
 * What is known of a run, with what has come: a whole history or what is new in it; null where something is missing
 * between the two. News has the points after its step `since` and the marks from it on; a run that began anew, or goes
 * on from an earlier step, says less than is known, and what is known after that step is gone.
 */
export function merged(known, news) {
  const same = known?.run === news.run && known.began === news.began;
  if (same && news.at < known.at) return known;
  if (news.since > 0 && !(same && news.since <= last(known))) return null;
  const before = same ? known : { points: [], validations: [], saves: [], samples: [], resumed: [] };
  const joined = (marks) => [...before[marks].filter((each) => at(each) < news.since), ...news[marks]];
  const points = [...before.points.filter(([step]) => step <= news.since), ...news.points];
  return {
    ...news,
    points: points.length > MOST ? thinned(points, MOST / 2) : points,
    validations: joined("validations"),
    saves: joined("saves"),
    samples: joined("samples"),
    resumed: joined("resumed"),
  };
}

/** The last step that is known of a run. */
export function last(known) {
  return known?.points.at(-1)?.[0] ?? 0;
}

function at(mark) {
  return Array.isArray(mark) ? mark[0] : mark;
}

/** Some of these [step, loss, …], at most so many: the first, the last, and of equal stretches the lowest and highest. */
export function thinned(points, most) {
  const count = points.length;
  if (count <= most) return points;
  const stretches = Math.max(1, Math.floor((most - 2) / 2));
  const found = new Set([0, count - 1]);
  for (let number = 0; number < stretches; number++) {
    const [from, to] = [number, number + 1].map((each) => Math.floor((each * count) / stretches));
    let [low, high] = [from, from];
    for (let place = from; place < to; place++) {
      if (points[place][1] < points[low][1]) low = place;
      if (points[place][1] > points[high][1]) high = place;
    }
    found.add(low).add(high);
  }
  return [...found].sort((one, other) => one - other).map((place) => points[place]);
}

/** The last of these that is not after a step; they are sorted. */
export function upTo(marks, step) {
  let [low, high] = [0, marks.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (marks[middle][0] <= step) low = middle + 1;
    else high = middle;
  }
  return marks[low - 1];
}

/** [lowest, highest] of what a chart of a run shows. A few losses far from the others lie outside. */
export function range({ points, validations }, log) {
  const shown = (value) => value !== null && (!log || value > 0);
  const raw = points.map((each) => each[1]).filter(shown).sort((one, other) => one - other);
  const edge = Math.floor(raw.length * 0.01);
  const inside = [...points.map((each) => each[2]), ...validations.map((each) => each[1])].filter(shown);
  const all = [...raw.slice(edge, raw.length - edge), ...inside];
  if (!all.length) return log ? [0.1, 1] : [0, 1];
  let [low, high] = [Math.min(...all), Math.max(...all)];
  if (log) {
    const room = Math.max(Math.log10(high / low) * 0.06, 0.02);
    return [low / 10 ** room, high * 10 ** room];
  }
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  if (low >= 0) return [Math.max(0, low - room), high + room];
  return [low - room, high + room];
}

/** Round numbers between two, about so many. */
export function ticks(low, high, about, log = false) {
  if (log) {
    for (const digits of [[1, 2, 5], [1]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
        found.push(...digits.map((digit) => Number(`${digit}e${power}`)).filter((each) => each >= low && each <= high));
      }
      if (found.length > 1 && found.length <= 2 * about) return found;
    }
  }
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= 0.75 * rough);
  const found = [];
  for (let number = Math.ceil(low / step); number * step <= high; number++) found.push(Number((number * step).toPrecision(12)));
  return found;
}

/** A loss with three digits. */
export function loss(value) {
  if (value === null || value === undefined) return "–";
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3);
}

/** 12:05, or 1:02:05 with hours. */
export function duration(seconds) {
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** 1.9 it/s, or 4.2 s/it where that is more than a second. */
export function speed(steps) {
  return steps >= 1 ? `${steps.toPrecision(steps >= 100 ? 3 : 2)} it/s` : `${(1 / steps).toPrecision(2)} s/it`;
}

export function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${Math.round(bytes / 1e6)} MB`;
}

/** How a run goes in a line. */
export function line(run) {
  const told = [`step ${run.step}/${run.steps}`];
  if (run.state === "running") {
    if (run.speed) told.push(speed(run.speed));
    if (run.left !== null) told.push(`${duration(run.left)} left`);
  }
  if (run.loss !== null) told.push(`loss ${loss(run.loss)} (smoothed ${loss(run.smoothed)})`);
  if (run.memory) told.push(size(run.memory));
  return told.join(" · ");
}
