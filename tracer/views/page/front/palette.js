/** Colours that colour-blind people tell apart (Okabe and Ito's for kinds, cividis for amounts), light and dark. */

/** @typedef {{ paper: string, panel: string, ink: string, quiet: string, line: string, accent: string, box: string, open: string, kinds: { [kind: string]: string } }} Colours */

const KINDS = {
  light: {
    compute: "#0072b2", transfer: "#e69f00", waiting: "#c44900", bubble: "#a9d6ee", idle: "#d9d9d4", host: "#8a8a85",
    routing: "#b2558a", ends: "#00795a",
  },
  dark: {
    compute: "#56b4e9", transfer: "#f0b429", waiting: "#e8703a", bubble: "#2a5d7c", idle: "#3a3c40", host: "#80838a",
    routing: "#dd8fb8", ends: "#2cc295",
  },
};

/** @type {{ light: Colours, dark: Colours }} */
export const PALETTES = {
  light: {
    paper: "#fbfaf7", panel: "#ffffff", ink: "#1b1d1f", quiet: "#62666b", line: "#d4d2cb", accent: "#111111",
    box: "#ffffff", open: "#f1efe9", kinds: KINDS.light,
  },
  dark: {
    paper: "#16181b", panel: "#1e2125", ink: "#eceae4", quiet: "#9a9ea5", line: "#383c42", accent: "#ffffff",
    box: "#24272c", open: "#1b1e22", kinds: KINDS.dark,
  },
};

/** Places on an axis, in turn; a number in the cell tells them apart as well. */
export const TURNS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f"];

const CIVIDIS = [
  [0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116],
  [195, 179, 105], [225, 204, 85], [254, 232, 56],
];

/**
 * A colour for an amount.
 * @param {number} share from 0 to 1
 */
export function amountColour(share) {
  const [red, green, blue] = amountChannels(share);
  return `rgb(${red},${green},${blue})`;
}

/**
 * @param {number} share from 0 to 1
 * @returns {[number, number, number]}
 */
export function amountChannels(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const rest = at - low;
  const mix = (/** @type {number} */ i) => Math.round(CIVIDIS[low][i] + rest * (CIVIDIS[low + 1][i] - CIVIDIS[low][i]));
  return [mix(0), mix(1), mix(2)];
}

/**
 * Ink that is legible on an amount's colour.
 * @param {number} share
 */
export function inkOn(share) {
  return share > 0.55 ? "#111111" : "#ffffff";
}

/**
 * Stripes: what is estimated, in every view.
 * @param {CanvasRenderingContext2D} context
 * @param {string} colour
 * @param {string} ground
 * @returns {CanvasPattern | string}
 */
export function stripes(context, colour, ground) {
  const key = `${colour} ${ground}`;
  const known = PATTERNS.get(key);
  if (known) return known;
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const ink = /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d"));
  ink.fillStyle = ground;
  ink.fillRect(0, 0, 8, 8);
  ink.strokeStyle = colour;
  ink.lineWidth = 2.4;
  ink.beginPath();
  for (const shift of [-8, 0, 8]) {
    ink.moveTo(shift - 2, 10);
    ink.lineTo(shift + 10, -2);
  }
  ink.stroke();
  const made = context.createPattern(tile, "repeat") ?? colour;
  PATTERNS.set(key, made);
  return made;
}

/** @type {Map<string, CanvasPattern | string>} */
const PATTERNS = new Map();
