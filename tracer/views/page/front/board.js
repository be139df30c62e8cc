/** A canvas as large as its place, sharp on any screen, that tells where it is pointed at. */

/**
 * @typedef {object} Handlers
 * @property {(board: Board) => void} draw
 * @property {(x: number, y: number) => string | null} [hover] what to say; null says nothing
 * @property {(x: number, y: number, event: MouseEvent) => void} [click]
 * @property {(x: number, y: number) => void} [double]
 * @property {(x: number, y: number, dx: number, dy: number, event: PointerEvent) => void} [drag]
 * @property {(x0: number, y0: number, x1: number, y1: number) => void} [drop] after a drag
 * @property {(x: number, y: number, event: WheelEvent) => void} [wheel]
 */

const STILL = 4; // pixels that a click may move

export class Board {
  /**
   * @param {HTMLElement} place
   * @param {string} label
   * @param {Handlers} handlers
   */
  constructor(place, label, handlers) {
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", label);
    place.append(this.canvas);
    this.context = /** @type {CanvasRenderingContext2D} */ (this.canvas.getContext("2d"));
    this.handlers = handlers;
    this.width = 0;
    this.height = 0;
    this.tip = tooltip();
    new ResizeObserver(() => this.draw()).observe(place);
    this._listen();
  }

  /** Find out how large it is. @returns {boolean} whether it is to be seen */
  measure() {
    const place = /** @type {HTMLElement} */ (this.canvas.parentElement);
    const { clientWidth: width, clientHeight: height } = place;
    if (!width || !height) return false;
    this.width = width;
    this.height = height;
    return true;
  }

  /** Draw now; nothing while it is hidden. */
  draw() {
    if (!this.measure()) return;
    const { width, height } = this;
    const ratio = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.context.clearRect(0, 0, width, height);
    this.handlers.draw(this);
  }

  _listen() {
    const { canvas, handlers } = this;
    /** @type {{ x: number, y: number, x0: number, y0: number, moved: boolean } | null} */
    let held = null;
    const at = (/** @type {MouseEvent} */ event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      const [x, y] = at(event);
      held = { x, y, x0: x, y0: y, moved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = at(event);
      if (held) {
        held.moved ||= Math.hypot(x - held.x0, y - held.y0) > STILL;
        if (held.moved) handlers.drag?.(x, y, x - held.x, y - held.y, event);
        held.x = x;
        held.y = y;
        this.tip.hidden = true;
        return;
      }
      this._say(handlers.hover?.(x, y) ?? null, event);
    });
    canvas.addEventListener("pointerup", (event) => {
      const was = held;
      held = null;
      if (!was) return;
      const [x, y] = at(event);
      if (was.moved) handlers.drop?.(was.x0, was.y0, x, y);
      else handlers.click?.(x, y, event);
    });
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    canvas.addEventListener("dblclick", (event) => {
      const [x, y] = at(event);
      handlers.double?.(x, y);
    });
    canvas.addEventListener("wheel", (event) => {
      if (!handlers.wheel) return;
      event.preventDefault();
      const [x, y] = at(event);
      this.tip.hidden = true;
      handlers.wheel(x, y, event);
    }, { passive: false });
  }

  /**
   * @param {string | null} text
   * @param {MouseEvent} event
   */
  _say(text, event) {
    this.canvas.style.cursor = text === null ? "default" : "pointer";
    this.tip.hidden = text === null || text === "";
    if (this.tip.hidden) return;
    this.tip.textContent = text;
    const box = this.tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const top = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18;
    this.tip.style.left = `${Math.max(4, left)}px`;
    this.tip.style.top = `${Math.max(4, top)}px`;
  }
}

/**
 * Cut a text to a width.
 * @param {CanvasRenderingContext2D} context
 * @param {string} text
 * @param {number} width
 */
export function fit(context, text, width) {
  if (width < 8) return "";
  if (context.measureText(text).width <= width) return text;
  let low = 0;
  let high = text.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (context.measureText(`${text.slice(0, middle)}…`).width <= width) low = middle;
    else high = middle - 1;
  }
  return low > 0 ? `${text.slice(0, low)}…` : "";
}

export const FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";

function tooltip() {
  const known = document.getElementById("tip");
  if (known) return known;
  const made = document.createElement("div");
  made.id = "tip";
  made.hidden = true;
  document.body.append(made);
  return made;
}
