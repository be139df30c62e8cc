/** Slices that lie beside the page: the ranks on screen are fetched when a timeline is to be drawn. */

import { readColumn, readFooter } from "./parquet.js";
import { MOST_HELD, Slices } from "./slices.js";
import { writeCount } from "./text.js";

const COLUMNS = ["rank", "lane", "node", "leaf", "microbatch", "start", "span", "wait", "is_estimated"];

export class Remote {
  /** @param {import("./app.js").App} app */
  constructor(app) {
    this.app = app;
    this.key = "";
    /** @type {import("./parquet.js").RowGroup[] | null} */
    this.groups = null;
    this.numRequests = 0;
    this.name = app.model.meta.slices_file;
    const served = location.protocol.startsWith("http");
    app.whyNoSlices = served ? "reading …" : `${writeCount(app.model.meta.num_slices)} slices lie beside this page in ${this.name}: truedag view RUN --serve shows them`;
  }

  /**
   * Fetch what the ranks on screen did, if that is to be shown and is not here yet.
   * @param {number[]} ranks
   */
  async want(ranks) {
    if (!location.protocol.startsWith("http") || !this.app.state.lanes) return;
    const key = ranks.join();
    if (key === this.key) return;
    this.key = key;
    try {
      const loaded = await this.load(ranks);
      if (this.key !== key) return;
      if (loaded) this.app.model.slices = loaded;
      this.app.passing = null;
    } catch (error) {
      this.app.whyNoSlices = `${this.name} could not be read: ${error}`;
    }
    this.app.render();
  }

  /** @param {number[]} ranks @returns {Promise<Slices | null>} */
  async load(ranks) {
    const { meta } = this.app.model;
    if (!this.groups) {
      const head = await fetch(this.name, { method: "HEAD" });
      if (!head.ok) throw new Error(`the server says ${head.status}`);
      this.groups = await readFooter((from, to) => this.bytes(from, to), Number(head.headers.get("Content-Length")));
    }
    const low = Math.min(...ranks);
    const high = Math.max(...ranks);
    const groups = this.groups.filter((group) => {
      const chunk = /** @type {import("./parquet.js").Chunk} */ (group.chunks.get("rank"));
      return !(chunk.high < low || chunk.low > high);
    });
    const rows = groups.reduce((sum, group) => sum + group.numRows, 0);
    if (rows > MOST_HELD) {
      this.app.model.slices = null;
      this.app.whyNoSlices = `${writeCount(rows)} slices are too many to draw: filter by rank, 0-31 say`;
      return null;
    }
    const wanted = new Set(ranks);
    const parts = await Promise.all(groups.map((group) => Promise.all(COLUMNS.map((name) => readColumn((from, to) => this.bytes(from, to), group, name)))));
    const keep = parts.map(([rank]) => rank.reduce((count, one) => count + Number(wanted.has(one)), 0));
    const total = keep.reduce((sum, count) => sum + count, 0);
    /** @type {{ [name: string]: Float64Array }} */
    const table = Object.fromEntries(COLUMNS.map((name) => [name, new Float64Array(total)]));
    let at = 0;
    for (const part of parts) {
      for (let row = 0; row < part[0].length; row++) {
        if (!wanted.has(part[0][row])) continue;
        COLUMNS.forEach((name, column) => { table[name][at] = part[column][row]; });
        at++;
      }
    }
    return new Slices(table, meta.tick_ns, this.app.pairs);
  }

  /** @param {number} from @param {number} to */
  async bytes(from, to) {
    this.numRequests++;
    const answer = await fetch(this.name, { headers: { Range: `bytes=${from}-${to - 1}` } });
    if (answer.status !== 206) throw new Error(`the server says ${answer.status}, not 206`);
    return answer.arrayBuffer();
  }
}
