// Numbers as people read them, and the arithmetic of errors (the same as report/facts.py).

const count = (value) => value.toLocaleString("en-US");
const MINUS = "\u2212";

/** Decimal units, three figures, as the command line prints them. */
function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 999.5 && unit < units.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  if (unit === 0) return `${bytes} B`;
  return `${bytes.toFixed(bytes < 9.995 ? 2 : bytes < 99.95 ? 1 : 0)} ${units[unit]}`;
}

/** 1.23 B, 117 M: how large models are spoken of. */
function short(value) {
  const units = ["", " k", " M", " B", " T"];
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return unit === 0 ? `${value}` : `${value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0)}${units[unit]}`;
}

/** Three significant figures, with an exponent where zeros would take the room. */
function number(value, figures = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : `${MINUS}∞`;
  if (value === 0) return "0";
  const tall = Math.abs(value);
  let text;
  if (tall >= 1e5 || tall < 1e-3) {
    const [digits, exponent] = value.toExponential(figures - 1).split("e");
    text = `${Number(digits)}e${Number(exponent)}`;
  } else {
    text = `${Number(value.toPrecision(figures))}`;
  }
  return text.replaceAll("-", MINUS);
}

/** Two decimals; 'same' where every value is the same number, which is more than that no difference adds up. */
function decibels(error, unit = "") {
  const value = sqnr(error);
  if (value === Infinity) return error.differ ? "∞" : "same";
  return (value === -Infinity ? "-∞" : value.toFixed(2) + unit).replace("-", MINUS);
}

/** Per cent; what is there is never called 0, and what lacks some is never called all. */
function share(part, whole) {
  if (!whole) return "–";
  if (!part) return "0";
  if (part === whole) return "100 %";
  const percent = (100 * part) / whole;
  if (percent < 0.01) return "< 0.01 %";
  if (percent > 99.99) return "> 99.99 %";
  return `${percent < 10 ? percent.toFixed(2) : percent.toFixed(1)} %`;
}

const sqnr = (error) =>
  error.noise === 0 ? Infinity : error.signal > 0 ? 10 * Math.log10(error.signal / error.noise) : -Infinity;
const mse = (error) => (error.values ? error.noise / error.values : 0);

function cosine(error) {
  if (error.noise === 0) return 1;
  const scale = Math.sqrt(error.signal) * Math.sqrt(error.power);
  return scale ? error.dot / scale : 0;
}

/** The error over several tensors together; null where there are none. */
function together(errors) {
  const sum = { values: 0, differ: 0, leftOut: 0, signal: 0, noise: 0, dot: 0, power: 0, maxAbs: 0, maxRel: 0 };
  let any = false;
  for (const error of errors) {
    if (error === null) continue;
    any = true;
    for (const name of ["values", "differ", "leftOut", "signal", "noise", "dot", "power"]) sum[name] += error[name];
    sum.maxAbs = Math.max(sum.maxAbs, error.maxAbs);
    sum.maxRel = Math.max(sum.maxRel, error.maxRel);
  }
  return any ? sum : null;
}

/** Groups in the order of their first member. */
function grouped(rows, key) {
  const groups = new Map();
  for (const row of rows) {
    const name = key(row);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(row);
  }
  return groups;
}

// Codes of E2M1 from the most negative to the largest; both zeros have a place.
const CODE_ORDER = [15, 14, 13, 12, 11, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7];
const CODE_NAMES = ["0", "0.5", "1", "1.5", "2", "3", "4", "6"];
const codeName = (code) => (code < 8 ? CODE_NAMES[code] : MINUS + CODE_NAMES[code - 8]);

// E4M3 by code 0..126: three bits of mantissa, exponents from -6 (below it, steps of 2^-9) to 8.
const E4M3 = Array.from({ length: 127 }, (_, code) =>
  code < 8 ? code * 2 ** -9 : (1 + (code % 8) / 8) * 2 ** (Math.floor(code / 8) - 7),
);
const E4M3_CODE = new Map(E4M3.map((value, code) => [value, code]));
