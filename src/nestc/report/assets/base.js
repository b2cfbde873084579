// What everything else uses: the data, elements, numbers with units, the tooltip, and which region is chosen.
const root = document.documentElement;
const note = (message) => {
  root.dataset.error = [root.dataset.error, message].filter(Boolean).join(' | ');
};
addEventListener('error', (event) => note(event.message || String(event)));
addEventListener('unhandledrejection', (event) => note(String(event.reason)));
addEventListener('securitypolicyviolation', (event) => note(`policy: ${event.violatedDirective}`));

const data = JSON.parse(document.getElementById('data').textContent);
const by = (id) => document.getElementById(id);
const SVG = 'http://www.w3.org/2000/svg';

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Numbers: three significant digits, with the unit that fits.
function digits(value) {
  if (value === 0) return '0';
  const text = value.toPrecision(3);
  return text.includes('e') ? String(Number(text)) : text.replace(/(\.\d*?)0+$/, '$1').replace(/\.$/, '');
}
function scaled(value, steps) {
  const size = Math.abs(value);
  const [unit, factor] = steps.find(([, least]) => size >= least * 0.9995) || steps[steps.length - 1];
  return `${digits(value / factor)} ${unit}`;
}
const missing = '\u2013';
const maybe = (format) => (value) => (value === null || value === undefined ? missing : format(value));
const ms = maybe((v) =>
  scaled(v, [
    ['s', 1e3],
    ['ms', 1],
    ['\u00b5s', 1e-3],
    ['ns', 1e-6],
  ]),
);
const mj = maybe((v) =>
  scaled(v, [
    ['J', 1e3],
    ['mJ', 1],
    ['\u00b5J', 1e-3],
    ['nJ', 1e-6],
  ]),
);
const bytes = maybe((v) =>
  scaled(v, [
    ['GiB', 2 ** 30],
    ['MiB', 2 ** 20],
    ['KiB', 2 ** 10],
    ['B', 1],
  ]),
);
const count = maybe((v) =>
  scaled(v, [
    ['T', 1e12],
    ['G', 1e9],
    ['M', 1e6],
    ['k', 1e3],
    ['', 1],
  ]).trim(),
);
const rate = (unit) =>
  maybe((v) =>
    scaled(v, [
      [`T${unit}`, 1e12],
      [`G${unit}`, 1e9],
      [`M${unit}`, 1e6],
      [unit, 1],
    ]),
  );
const percent = maybe((v) => `${digits(100 * v)} %`);
const value = (figure) => (figure ? figure.value : null);
const shape = (dtype, sizes) => `${dtype}[${sizes.map((size) => (size < 0 ? '?' : size)).join(',')}]`;
const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}\u2026` : text);
const kind = (name) => el('span', { class: `kind ${name.split(' ').pop()}` }, name);
const figure = (format, it) => (it ? [`${format(it.value)} `, kind(it.kind)] : [missing]);

// Devices and regions by name. Devices that most reports have keep their colour, others take what is free.
const devices = data.devices.map((device) => device.name);
const colours = new Map(
  [
    ['cpu', 0],
    ['vta', 1],
    ['aim', 2],
    ['onnxruntime', 3],
    ['openvino', 5],
    ['host', 7],
  ].filter(([name]) => devices.includes(name)),
);
for (const name of devices) {
  const free = [4, 6, 1, 2, 3, 5, 0, 7].find((number) => ![...colours.values()].includes(number));
  if (!colours.has(name)) colours.set(name, free ?? colours.size % 8);
}
const colour = (name) => `c${colours.get(name) ?? 7}`;
const modelled = (name) => data.devices.some((device) => device.name === name && device.kind.includes('modelled'));
const chip = (name, text) =>
  el('span', { class: `chip ${colour(name)} ${modelled(name) ? 'modelled' : ''}` }, text || name);
const regions = new Map(data.regions.map((region) => [region.name, region]));
const partitions = new Map(data.partitions.map((partition) => [partition.name, partition]));
const longest = Math.max(0, ...data.regions.map((region) => value(region.observed) || 0));

const FORMATS = new Set(['QuantizeLinear', 'DequantizeLinear', 'Cast']);
function title(region) {
  const kept = region.ops.filter((op) => !FORMATS.has(op));
  return (kept.length ? kept : region.ops).join(' + ');
}
// Equal neighbours once, with how many there are of them.
function operators(region) {
  const found = [];
  for (const op of region.ops) {
    if (found.length && found[found.length - 1][0] === op) found[found.length - 1][1] += 1;
    else found.push([op, 1]);
  }
  return found.map(([op, many]) => (many > 1 ? `${op} \u00d7${many}` : op)).join(', ');
}
function traffic(region) {
  const parts = [region.bytes_in, region.bytes_out, region.weights];
  return parts.includes(null) ? null : parts[0] + parts[1] + parts[2];
}
function intensity(region) {
  const moved = traffic(region);
  return region.operations && moved ? region.operations / moved : null;
}

const lines = (...parts) => parts.filter(Boolean).join('\n');
const words = (...parts) => parts.filter(Boolean).join(' ');

// The tooltip: beside the pointer, or below what has the focus. Text only.
function tip(element, text) {
  const box = by('tip');
  const show = (x, y) => {
    box.textContent = typeof text === 'function' ? text() : text;
    box.hidden = false;
    const left = Math.min(x + 14, scrollX + innerWidth - box.offsetWidth - 8);
    box.style.left = `${Math.max(scrollX + 4, left)}px`;
    box.style.top = `${y + 16 + box.offsetHeight > scrollY + innerHeight ? y - box.offsetHeight - 8 : y + 16}px`;
  };
  element.addEventListener('pointermove', (event) => show(event.pageX, event.pageY));
  element.addEventListener('pointerleave', () => {
    box.hidden = true;
  });
  element.addEventListener('blur', () => {
    box.hidden = true;
  });
  element.addEventListener('focus', () => {
    if (!element.matches(':focus-visible')) return;
    const place = element.getBoundingClientRect();
    show(place.left + scrollX, place.bottom + scrollY - 10);
  });
  return element;
}

// Which region is chosen; whoever shows regions is told.
const listeners = [];
let chosen = null;
function choose(name, from) {
  chosen = name;
  for (const listener of listeners) listener(name, from);
}
