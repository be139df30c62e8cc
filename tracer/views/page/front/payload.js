/** Reads the tables out of the page; the layout is told in payload.py. */

/** @typedef {{ [column: string]: any }} Table */
/** @typedef {{ tables: { [name: string]: Table }, documents: { [name: string]: any } }} Payload */

const MAKERS = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array, f8: Float64Array,
};

/**
 * Unpack the page's payload.
 * @param {string} text
 * @returns {Promise<Payload>}
 */
export async function readPayload(text) {
  const bytes = new Uint8Array(await unpack(decode(text.trim()), "deflate"));
  const size = new DataView(bytes.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  const body = bytes.subarray(4 + size);
  /** @type {{ [name: string]: Table }} */
  const tables = {};
  for (const [name, columns] of Object.entries(header.tables)) {
    /** @type {Table} */
    const table = { length: 0 };
    for (const [column, told] of Object.entries(/** @type {any} */ (columns))) {
      table[column] = readColumn(body, told);
      table.length = told.length;
      if (told.names) table[column].names = told.names;
      if (told.runs) table[column].runs = told.runs;
    }
    tables[name] = table;
  }
  return { tables, documents: header.documents };
}

/**
 * @param {BufferSource} bytes
 * @param {"deflate" | "gzip"} format
 * @returns {Promise<ArrayBuffer>}
 */
export function unpack(bytes, format) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream(format));
  return new Response(stream).arrayBuffer();
}

/** @param {string} text */
function decode(text) {
  const native = /** @type {any} */ (Uint8Array).fromBase64;
  if (native) return native.call(Uint8Array, text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/**
 * @param {Uint8Array} body
 * @param {{ type: keyof typeof MAKERS, length: number, at: number, delta: boolean }} told
 */
function readColumn(body, told) {
  const Maker = MAKERS[told.type];
  const width = Maker.BYTES_PER_ELEMENT;
  const plain = new Uint8Array(told.length * width);
  for (let place = 0; place < width; place++) {
    const from = told.at + place * told.length;
    for (let i = 0; i < told.length; i++) plain[i * width + place] = body[from + i];
  }
  const array = new Maker(plain.buffer);
  if (!told.delta) return array;
  const sums = new Uint32Array(told.length);
  let sum = 0;
  for (let i = 0; i < told.length; i++) {
    sum = (sum + array[i]) >>> 0;
    sums[i] = sum;
  }
  return sums;
}
