/**
 * Reads columns of a Parquet file by byte ranges: the footer first, then what is asked for of each row group.
 *
 * What it reads is what truedag writes: flat columns of INT32, INT64 and BOOLEAN, gzip or none, plain or by dictionary.
 * Source of the layout: the Apache Parquet format (parquet.thrift, Encodings.md).
 */

import { unpack } from "./payload.js";

/** @typedef {(from: number, to: number) => Promise<ArrayBuffer>} Fetch bytes, `to` excluded */
/** @typedef {{ name: string, type: number, codec: number, from: number, size: number, low: number, high: number }} Chunk */
/** @typedef {{ numRows: number, chunks: Map<string, Chunk> }} RowGroup */

const TAIL = 1 << 16;
const INT32 = 1;
const INT64 = 2;
const GZIP = 2;
const PLAIN = 0;
const PLAIN_DICTIONARY = 2;
const RLE = 3;
const RLE_DICTIONARY = 8;
const DATA_PAGE = 0;
const DICTIONARY_PAGE = 2;
const DATA_PAGE_V2 = 3;

/**
 * @param {Fetch} fetchBytes
 * @param {number} size of the file
 * @returns {Promise<RowGroup[]>}
 */
export async function readFooter(fetchBytes, size) {
  let from = Math.max(0, size - TAIL);
  let tail = new Uint8Array(await fetchBytes(from, size));
  const length = new DataView(tail.buffer).getUint32(tail.length - 8, true);
  if (String.fromCharCode(...tail.subarray(-4)) !== "PAR1") throw new Error("it is no Parquet file");
  if (length + 8 > tail.length) {
    from = size - length - 8;
    tail = new Uint8Array(await fetchBytes(from, size));
  }
  const footer = readStruct({ bytes: tail, at: tail.length - 8 - length });
  return footer[4].map((/** @type {any} */ group) => {
    const chunks = new Map();
    for (const column of group[1]) {
      const meta = column[3];
      const name = text(meta[3][0]);
      const begin = meta[11] === undefined ? meta[9] : Math.min(meta[9], meta[11]);
      const statistics = meta[12] ?? {};
      chunks.set(name, {
        name, type: meta[1], codec: meta[4], from: begin, size: meta[7],
        low: bound(statistics[6] ?? statistics[2], meta[1]), high: bound(statistics[5] ?? statistics[1], meta[1]),
      });
    }
    return { numRows: group[3], chunks };
  });
}

/**
 * A column of a row group; null is -1.
 * @param {Fetch} fetchBytes
 * @param {RowGroup} group
 * @param {string} name
 * @returns {Promise<Float64Array>}
 */
export async function readColumn(fetchBytes, group, name) {
  const chunk = /** @type {Chunk} */ (group.chunks.get(name));
  const bytes = new Uint8Array(await fetchBytes(chunk.from, chunk.from + chunk.size));
  const out = new Float64Array(group.numRows);
  /** @type {Float64Array | null} */
  let dictionary = null;
  let row = 0;
  const cursor = { bytes, at: 0 };
  while (row < group.numRows) {
    const header = readStruct(cursor);
    const raw = bytes.subarray(cursor.at, cursor.at + header[3]);
    cursor.at += header[3];
    if (header[1] === DICTIONARY_PAGE) {
      dictionary = plainValues(await inflate(raw, chunk.codec), 0, header[7][1], chunk.type);
    } else if (header[1] === DATA_PAGE) {
      const page = await inflate(raw, chunk.codec);
      const levels = new DataView(page.buffer, page.byteOffset).getUint32(0, true);
      row = takePage(out, row, header[5][1], header[5][2], page.subarray(4, 4 + levels), page.subarray(4 + levels), dictionary, chunk.type);
    } else if (header[1] === DATA_PAGE_V2) {
      const told = header[8];
      const levels = raw.subarray(told[6], told[6] + told[5]);
      const rest = raw.subarray(told[5] + told[6]);
      const values = told[7] === false ? rest : await inflate(rest, chunk.codec);
      row = takePage(out, row, told[1], told[4], levels, values, dictionary, chunk.type);
    } else throw new Error(`a page of kind ${header[1]}`);
  }
  return out;
}

/**
 * @param {Float64Array} out
 * @param {number} row
 * @param {number} count
 * @param {number} encoding
 * @param {Uint8Array} levels
 * @param {Uint8Array} values
 * @param {Float64Array | null} dictionary
 * @param {number} type
 * @returns {number} the next row
 */
function takePage(out, row, count, encoding, levels, values, dictionary, type) {
  const isThere = hybrid(levels, 1, count);
  let known = 0;
  for (let i = 0; i < count; i++) known += isThere[i];
  /** @type {ArrayLike<number>} */
  let found;
  if (encoding === PLAIN) found = plainValues(values, 0, known, type);
  else if ((encoding === RLE_DICTIONARY || encoding === PLAIN_DICTIONARY) && dictionary) {
    const codes = hybrid(values.subarray(1), values[0], known);
    found = Float64Array.from(codes, (code) => /** @type {Float64Array} */ (dictionary)[code]);
  } else if (encoding === RLE) found = hybrid(values.subarray(4), 1, known);
  else throw new Error(`encoding ${encoding}`);
  let next = 0;
  for (let i = 0; i < count; i++) out[row + i] = isThere[i] ? found[next++] : -1;
  return row + count;
}

/**
 * Runs and packed bits in turn.
 * @param {Uint8Array} bytes
 * @param {number} width bits of a value
 * @param {number} count
 */
function hybrid(bytes, width, count) {
  const out = new Uint32Array(count);
  const cursor = { bytes, at: 0 };
  const size = Math.ceil(width / 8);
  let at = 0;
  while (at < count && cursor.at < bytes.length) {
    const head = unsigned(cursor);
    if (head & 1) {
      const number = Math.min((head >>> 1) * 8, count - at);
      const begin = cursor.at;
      for (let i = 0; i < number; i++) {
        let value = 0;
        for (let bit = 0; bit < width; bit++) {
          const place = i * width + bit;
          value |= ((bytes[begin + (place >> 3)] >> (place & 7)) & 1) << bit;
        }
        out[at + i] = value >>> 0;
      }
      cursor.at += (head >>> 1) * width;
      at += number;
    } else {
      let value = 0;
      for (let i = 0; i < size; i++) value += bytes[cursor.at + i] * 2 ** (8 * i);
      cursor.at += size;
      const number = Math.min(head >>> 1, count - at);
      out.fill(value, at, at + number);
      at += number;
    }
  }
  return out;
}

/** @param {Uint8Array} bytes @param {number} at @param {number} count @param {number} type */
function plainValues(bytes, at, count, type) {
  const view = new DataView(bytes.buffer, bytes.byteOffset + at);
  const out = new Float64Array(count);
  if (type === INT32) for (let i = 0; i < count; i++) out[i] = view.getInt32(4 * i, true);
  else if (type === INT64) {
    for (let i = 0; i < count; i++) out[i] = view.getUint32(8 * i, true) + 4294967296 * view.getInt32(8 * i + 4, true);
  } else if (type === 0) for (let i = 0; i < count; i++) out[i] = (bytes[at + (i >> 3)] >> (i & 7)) & 1;
  else throw new Error(`a column of type ${type}`);
  return out;
}

/** @param {Uint8Array} bytes @param {number} codec */
async function inflate(bytes, codec) {
  if (codec !== GZIP) return bytes.slice();
  return new Uint8Array(await unpack(bytes.slice(), "gzip"));
}

/** @param {Uint8Array | undefined} bytes @param {number} type */
function bound(bytes, type) {
  return bytes && (type === INT32 || type === INT64) ? plainValues(bytes.slice(), 0, 1, type)[0] : NaN;
}

/** @param {Uint8Array} bytes */
function text(bytes) {
  return new TextDecoder().decode(bytes);
}

/** @typedef {{ bytes: Uint8Array, at: number }} Cursor */

/**
 * A struct of Thrift's compact protocol, by field number.
 * @param {Cursor} cursor
 * @returns {any}
 */
function readStruct(cursor) {
  /** @type {{ [field: number]: any }} */
  const found = {};
  let field = 0;
  for (;;) {
    const head = cursor.bytes[cursor.at++];
    if (head === 0) return found;
    const step = head >> 4;
    field = step ? field + step : signed(cursor);
    found[field] = readValue(cursor, head & 15);
  }
}

/** @param {Cursor} cursor @param {number} kind @returns {any} */
function readValue(cursor, kind) {
  switch (kind) {
    case 1: return true;
    case 2: return false;
    case 3: return cursor.bytes[cursor.at++];
    case 4: case 5: case 6: return signed(cursor);
    case 7: cursor.at += 8; return NaN;
    case 8: {
      const length = unsigned(cursor);
      cursor.at += length;
      return cursor.bytes.subarray(cursor.at - length, cursor.at);
    }
    case 9: case 10: {
      const head = cursor.bytes[cursor.at++];
      const length = head >> 4 === 15 ? unsigned(cursor) : head >> 4;
      return Array.from({ length }, () => (head & 15) < 3 ? cursor.bytes[cursor.at++] === 1 : readValue(cursor, head & 15));
    }
    case 12: return readStruct(cursor);
    default: throw new Error(`the footer has a field of kind ${kind}`);
  }
}

/** @param {Cursor} cursor */
function unsigned(cursor) {
  let value = 0;
  let factor = 1;
  for (;;) {
    const byte = cursor.bytes[cursor.at++];
    value += (byte & 127) * factor;
    if (byte < 128) return value;
    factor *= 128;
  }
}

/** @param {Cursor} cursor */
function signed(cursor) {
  const value = unsigned(cursor);
  return value % 2 ? -(value + 1) / 2 : value / 2;
}
