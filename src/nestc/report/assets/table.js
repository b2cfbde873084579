// The table of regions: sorted by a click on a heading, filtered by words and by device.
const COLUMNS = [
  ['Region', 'region', (region) => region.name, (v) => v],
  ['Device', '', (region) => region.device, (v) => chip(v)],
  ['Operators', 'ops', operators, (v) => v],
  ['Observed', 'n', (region) => value(region.observed), ms],
  ['Share', 'n', (region) => (total && region.observed ? region.observed.value / total : null), percent],
  ['Known by', '', (region) => (region.observed ? region.observed.kind : 'not alone'), (v) => kind(v)],
  ['Predicted', 'n', (region) => value(region.predicted), ms],
  ['Energy', 'n', (region) => value(region.energy), mj],
  ['Operations', 'n', (region) => region.operations, count],
  ['In', 'n', (region) => region.bytes_in, bytes],
  ['Out', 'n', (region) => region.bytes_out, bytes],
  ['Weights', 'n', (region) => region.weights, bytes],
  ['Op/byte', 'n', intensity, maybe(digits)],
];
const total = data.regions.reduce((sum, region) => sum + (value(region.observed) || 0), 0);
const rows = new Map();
const order = { column: null, up: true };

function drawTable() {
  const head = el(
    'tr',
    {},
    ...COLUMNS.map(([name, kind_], at) => {
      const button = el('button', { type: 'button' }, name);
      button.addEventListener('click', () => sortBy(at));
      return el('th', { class: kind_ === 'n' ? 'n' : '', scope: 'col', 'aria-sort': 'none' }, button);
    }),
  );
  by('table').tHead.append(head);
  for (const region of data.regions) {
    const row = el(
      'tr',
      { tabindex: -1, 'data-region': region.name },
      ...COLUMNS.map(([, name, get, show_]) => el('td', { class: name }, show_(get(region)))),
    );
    row.addEventListener('click', () => choose(region.name, 'table'));
    const name = row.cells[0];
    const open = el('a', { href: '#graph' }, region.name);
    open.addEventListener('click', () => choose(region.name, 'link'));
    name.replaceChildren(open);
    rows.set(region.name, row);
  }
  by('table').tBodies[0].append(...rows.values());
  by('filter-device').append(el('option', { value: '' }, 'all'), ...devices.map((name) => el('option', {}, name)));
  by('filter').addEventListener('input', filter);
  by('filter-device').addEventListener('change', filter);
  filter();
}

// The first click on numbers puts the largest first; what is not known comes last either way.
function sortBy(at) {
  const number = COLUMNS[at][1] === 'n';
  order.up = order.column === at ? !order.up : !number;
  order.column = at;
  const get = COLUMNS[at][2];
  const sign = order.up ? 1 : -1;
  const sorted = [...data.regions].sort((a, b) => {
    const [x, y] = [get(a), get(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (number ? x - y : x.localeCompare(y, undefined, { numeric: true }));
  });
  by('table').tBodies[0].append(...sorted.map((region) => rows.get(region.name)));
  [...by('table').tHead.rows[0].cells].forEach((cell, column) => {
    cell.setAttribute('aria-sort', column === at ? (order.up ? 'ascending' : 'descending') : 'none');
  });
}

function filter() {
  const words = by('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
  const device = by('filter-device').value;
  const shown = data.regions.filter((region) => {
    const all = [region.name, region.device, region.partition, ...region.ops, ...region.nodes].join(' ').toLowerCase();
    const found = words.every((word) => all.includes(word)) && (!device || region.device === device);
    rows.get(region.name).hidden = !found;
    return found;
  });
  by('rows').textContent = `${shown.length} of ${data.regions.length} regions`;
  const sum = (get) => {
    const known = shown.map(get).filter((each) => each !== null && each !== undefined);
    return known.length ? known.reduce((a, b) => a + b, 0) : null;
  };
  const sums = { Observed: ms, Share: percent, Predicted: ms, Energy: mj, Operations: count, Weights: bytes };
  by('table').tFoot.replaceChildren(
    el(
      'tr',
      {},
      ...COLUMNS.map(([name, kind_, get], at) =>
        el('td', { class: kind_ === 'n' ? 'n' : '' }, at === 0 ? 'Together' : sums[name] ? sums[name](sum(get)) : ''),
      ),
    ),
  );
}
listeners.push((name) => {
  for (const [region, row] of rows) row.classList.toggle('chosen', region === name);
});
