/** How numbers are written for people. What is estimated begins with a wave, what is unknown says so. */

const MOST_TYPED = 100000; // numbers that a range may span
const FEWEST_ALIKE = 5; // so many runs at one distance are written with a step

/**
 * A duration with three digits.
 * @param {number} ns NaN is unknown
 */
export function writeTime(ns) {
  if (!(ns >= 0)) return "unknown";
  for (const [size, unit] of /** @type {[number, string][]} */ ([[1e9, "s"], [1e6, "ms"], [1e3, "µs"]])) {
    if (ns >= 0.9995 * size) return `${digits(ns / size)} ${unit}`;
  }
  return `${Math.round(ns)} ns`;
}

/**
 * Measured if it is, else estimated, else unknown.
 * @param {number} measured
 * @param {number} estimated
 */
export function writeEither(measured, estimated) {
  if (measured >= 0) return writeTime(measured);
  return estimated >= 0 ? `≈ ${writeTime(estimated)} (estimated)` : "unknown";
}

/** How far a clock may be off that of the lowest rank. @param {number | null} ns NaN and null are unknown */
export function writeError(ns) {
  if (ns === null || !(ns >= 0)) return "unknown";
  return ns ? `± ${writeTime(ns)}` : "none: others are compared with it";
}

/** @param {number} count */
export function writeBytes(count) {
  if (!(count >= 0)) return "unknown";
  if (count > 0 && count < 1) return "< 1 B";
  for (const [power, unit] of /** @type {[number, string][]} */ ([[40, "TiB"], [30, "GiB"], [20, "MiB"], [10, "KiB"]])) {
    const size = 2 ** power;
    if (count >= size) return `${digits(count / size)} ${unit}`;
  }
  return `${Math.round(count)} B`;
}

/** How much one is above another. @param {number} share */
export function writeExcess(share) {
  return `+${share < 0.0995 ? (100 * share).toFixed(1) : Math.round(100 * share)} %`;
}

/**
 * Parts of a whole in tenths of a percent that add up to 100 %, as reports write them (quantities.py); null: there is none.
 * @param {number[]} amounts
 */
export function writeShares(amounts) {
  const whole = amounts.reduce((sum, amount) => sum + amount, 0);
  if (!(whole > 0)) return null;
  const parts = amounts.map((amount) => 1000 * (amount / whole));
  const tenths = parts.map(Math.floor);
  const left = Math.max(0, 1000 - tenths.reduce((sum, tenth) => sum + tenth, 0));
  const nearest = parts.map((_, at) => at).sort((one, other) => tenths[one] - parts[one] - (tenths[other] - parts[other]));
  for (const at of nearest.slice(0, left)) tenths[at]++;
  return tenths.map((tenth) => `${(tenth / 10).toFixed(1)} %`);
}

/** @param {number} count */
export function writeCount(count) {
  return Math.round(count).toLocaleString("en-US");
}

/** @param {number} count */
export function writeRanks(count) {
  return `${writeCount(count)} rank${count === 1 ? "" : "s"}`;
}

/** @param {number} flops */
export function writeFlops(flops) {
  if (!(flops > 0)) return flops === 0 ? "0" : "unknown";
  for (const [size, unit] of /** @type {[number, string][]} */ ([[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])) {
    if (flops >= size) return `${digits(flops / size)} ${unit}FLOP`;
  }
  return `${Math.round(flops)} FLOP`;
}

/**
 * Numbers as runs, in the manner of reports and drawings (quantities.py): 0-3,8; many at one distance as 6-1022 step 8, or
 * 0-3 to 992-995 step 32.
 * @param {ArrayLike<number>} runs first and count, in turn
 * @param {number} [most] how many parts are written
 */
export function writeRuns(runs, most = 8) {
  /** @type {[number, number][]} first and last of each */
  const spans = [];
  for (let i = 0; i < runs.length; i += 2) spans.push([runs[i], runs[i] + runs[i + 1] - 1]);
  let parts = [];
  for (let begin = 0, count = 0; begin < spans.length; begin += count) {
    count = countAlike(spans, begin);
    if (count < FEWEST_ALIKE) count = 1;
    parts.push(writeAlike(spans.slice(begin, begin + count)));
  }
  const size = repetitionOf(spans);
  if (size < parts.length) parts = Array.from({ length: size }, (_, turn) => writeAlike(spans.filter((_, place) => place % size === turn)));
  if (parts.length > most) parts.splice(most, parts.length, "…");
  return parts.length ? parts.join(",") : "none";
}

/** How many runs from one on are as long as it, each as far from the one before as the second from it. @param {[number, number][]} spans @param {number} begin */
function countAlike(spans, begin) {
  const [low, high] = spans[begin];
  let count = 1;
  for (; begin + count < spans.length; count++) {
    const distance = count * (spans[begin + 1][0] - low);
    const [first, last] = spans[begin + count];
    if (first !== low + distance || last !== high + distance) break;
  }
  return count;
}

/** Of how many runs the beginning is that makes all, often enough, when it is repeated at one distance. @param {[number, number][]} spans */
function repetitionOf(spans) {
  for (let size = 1; size * FEWEST_ALIKE <= spans.length; size++) {
    const distance = spans[size][0] - spans[0][0];
    const isNext = (/** @type {[number, number]} */ [low, high], /** @type {number} */ at) =>
      at + size >= spans.length || (spans[at + size][0] === low + distance && spans[at + size][1] === high + distance);
    if (spans.length % size === 0 && spans.every(isNext)) return size;
  }
  return spans.length;
}

/** @param {[number, number][]} spans */
function writeAlike(spans) {
  const [[low, high], [last, end]] = [spans[0], spans[spans.length - 1]];
  if (spans.length > 1) return `${low === high ? `${low}-${last}` : `${low}-${high} to ${last}-${end}`} step ${spans[1][0] - low}`;
  if (low === high) return `${low}`;
  return high === low + 1 ? `${low},${high}` : `${low}-${high}`;
}

/**
 * Numbers in any order as runs: first and count, in turn.
 * @param {Iterable<number>} numbers
 */
export function toRuns(numbers) {
  /** @type {number[]} */
  const runs = [];
  for (const number of [...numbers].sort((one, other) => one - other)) {
    if (runs.length && runs[runs.length - 2] + runs[runs.length - 1] === number) runs[runs.length - 1]++;
    else runs.push(number, 1);
  }
  return runs;
}

/**
 * What a person typed: 0-3,8 or 6-1022 step 8, or as audits write it, 0-3 to 992-995 step 32; null is everything, or
 * nothing that can be read.
 * @param {string} text
 * @returns {Set<number> | null}
 */
export function parseRuns(text) {
  const found = new Set();
  for (const part of text.replace(/\s+step\s+/g, "/").replace(/\s+to\s+/g, ":").split(/[,\s]+/)) {
    const match = /^(\d+)(?:-(\d+)(?::(\d+)-\d+)?(?:\/(\d+))?)?$/.exec(part);
    if (!match) continue;
    const [low, high] = [Number(match[1]), Number(match[2] ?? match[1])];
    const step = Math.max(1, Number(match[4] ?? 1));
    // A step is one of whole runs where the last of them is told; they do not overlap.
    const [size, last] = match[3] === undefined ? [0, high] : [high - low, Number(match[3])];
    if (size && size >= step) continue;
    for (let begin = low; begin <= Math.min(last, low + MOST_TYPED); begin += step) {
      for (let number = begin; number <= begin + Math.min(size, MOST_TYPED); number++) found.add(number);
    }
  }
  return found.size ? found : null;
}

/** @param {number} value */
function digits(value) {
  if (value >= 999.5) return Math.round(value).toLocaleString("en-US");
  return value.toPrecision(3);
}
