// The graph: boxes and edges where the report placed them, a view that moves and zooms, search, and a region's details.
const BOX = { width: 168, height: 42 };
const picture = svg('svg', { tabindex: 0, role: 'group', 'aria-label': 'Graph of regions, coloured by device' });
const nodes = new Map();
const edges = [];
const view = { x: 0, y: 0, width: data.width, height: data.height };

function drawGraph() {
  picture.append(
    svg(
      'defs',
      {},
      svg(
        'marker',
        {
          id: 'arrow',
          viewBox: '0 0 8 8',
          refX: 7,
          refY: 4,
          markerWidth: 7,
          markerHeight: 7,
          orient: 'auto',
          markerUnits: 'userSpaceOnUse',
        },
        svg('path', { d: 'M0 0L8 4L0 8z', class: 'arrow' }),
      ),
    ),
  );
  for (const edge of data.edges) {
    const path = svg('path', {
      d: edge.path,
      class: `edge ${edge.crosses ? 'crosses' : ''}`,
      'marker-end': 'url(#arrow)',
    });
    const took = edge.us ? `\n${ms(edge.us.value / 1e3)} to cross, ${edge.us.kind}` : '';
    tip(path, `${edge.tensor}\n${shape(edge.dtype, edge.shape)}, ${bytes(edge.bytes)}${took}`);
    edges.push([edge, path]);
    picture.append(path);
  }
  for (const border of data.borders) {
    const box = { x: -BOX.width / 2, y: -BOX.height / 2, width: BOX.width, height: BOX.height, rx: 21 };
    picture.append(
      tip(
        svg(
          'g',
          { class: 'border', transform: `translate(${border.x} ${border.y})` },
          svg('rect', { class: 'box', ...box }),
          svg('text', { 'text-anchor': 'middle', y: -2 }, cut(border.name, 22)),
          svg('text', { class: 'faint', 'text-anchor': 'middle', y: 13 }, cut(shape(border.dtype, border.shape), 26)),
        ),
        `${border.kind} ${border.name}\n${shape(border.dtype, border.shape)}`,
      ),
    );
  }
  for (const region of data.regions) picture.append(drawNode(region));
  by('drawing').append(picture);
  const first = nodes.values().next().value;
  if (first) first.setAttribute('tabindex', 0);
}

function drawNode(region) {
  const [left, top] = [-BOX.width / 2, -BOX.height / 2];
  const share = longest && region.observed ? region.observed.value / longest : 0;
  const under =
    `${region.name.split('_')[0]} \u00b7 ${region.device}` +
    (region.observed ? ` \u00b7 ${ms(region.observed.value)}` : '');
  const node = svg(
    'g',
    {
      class: `node ${colour(region.device)}`,
      transform: `translate(${region.x} ${region.y})`,
      tabindex: -1,
      role: 'button',
      'aria-label': `${region.name} on ${region.device}: ${operators(region)}`,
      'data-region': region.name,
    },
    svg('rect', { class: 'box', x: left, y: top, width: BOX.width, height: BOX.height, rx: 6 }),
    svg('rect', { class: 'tint', x: left, y: top, width: BOX.width, height: BOX.height, rx: 6 }),
    svg('rect', { class: 'side', x: left, y: top, width: 6, height: BOX.height, rx: 3 }),
    svg('text', { x: left + 12, y: -4 }, cut(title(region), 23)),
    svg('text', { class: 'faint', x: left + 12, y: 11 }, cut(under, 27)),
    share ? svg('rect', { class: 'share', x: left + 6, y: -top - 5, width: (BOX.width - 9) * share, height: 3 }) : null,
  );
  tip(node, `${region.name}\n${operators(region)}`);
  node.addEventListener('click', () => {
    if (!moved) choose(region.name, 'graph');
  });
  node.addEventListener('keydown', (event) => onNodeKey(event, region));
  nodes.set(region.name, node);
  return node;
}

// On a box, up and down go along the edges, left and right to the nearest box beside it.
function onNodeKey(event, region) {
  if (event.key === 'Enter' || event.key === ' ') {
    event.preventDefault();
    choose(region.name, 'graph');
    return;
  }
  const next = {
    ArrowDown: () => data.edges.find((edge) => edge.source === region.name && edge.destination)?.destination,
    ArrowUp: () => data.edges.find((edge) => edge.destination === region.name && edge.source)?.source,
    ArrowLeft: () => beside(region, -1),
    ArrowRight: () => beside(region, 1),
  }[event.key];
  if (!next) return;
  event.preventDefault();
  event.stopPropagation();
  const name = next();
  if (name) focusNode(name);
}

function beside(region, side) {
  const found = data.regions.filter((other) => (other.x - region.x) * side > 1);
  const far = (other) => Math.abs(other.x - region.x) + 4 * Math.abs(other.y - region.y);
  return found.length ? found.reduce((a, b) => (far(b) < far(a) ? b : a)).name : null;
}

function focusNode(name) {
  for (const node of nodes.values()) node.setAttribute('tabindex', -1);
  nodes.get(name).setAttribute('tabindex', 0);
  nodes.get(name).focus({ preventScroll: true });
  bringIntoView(name);
}

// The view, in the units of the drawing.
function show() {
  picture.setAttribute('viewBox', `${view.x} ${view.y} ${view.width} ${view.height}`);
}
function ratio() {
  return picture.clientHeight ? picture.clientWidth / picture.clientHeight : 1.6;
}
function fit() {
  // All of it, unless that would be too small to read: then the beginning of it.
  const pixels = picture.clientWidth || 900;
  const whole = Math.max(data.width + 40, (data.height + 20) * ratio());
  view.width = Math.min(Math.max(whole, pixels / 1.3), pixels * (pixels < 600 ? 1.5 : 2.2));
  view.height = view.width / ratio();
  view.x = whole > view.width ? -20 : (data.width - view.width) / 2;
  view.y = data.height + 20 > view.height ? -10 : (data.height - view.height) / 2;
  show();
}
function zoom(factor, x = view.x + view.width / 2, y = view.y + view.height / 2) {
  const width = Math.min(Math.max(view.width * factor, 120), 4 * Math.max(data.width, data.height * ratio(), 400));
  const real = width / view.width;
  view.x = x - (x - view.x) * real;
  view.y = y - (y - view.y) * real;
  view.width = width;
  view.height = width / ratio();
  show();
}
function pan(x, y) {
  view.x = Math.min(Math.max(view.x + x, -view.width / 2), data.width - view.width / 2);
  view.y = Math.min(Math.max(view.y + y, -view.height / 2), data.height - view.height / 2);
  show();
}
function bringIntoView(name) {
  const { x, y } = regions.get(name);
  const inside =
    x - BOX.width / 2 > view.x &&
    x + BOX.width / 2 < view.x + view.width &&
    y - BOX.height / 2 > view.y &&
    y + BOX.height / 2 < view.y + view.height;
  if (inside) return;
  view.x = x - view.width / 2;
  view.y = y - view.height / 2;
  show();
}

// A pointer moves the view, two zoom. On a touch screen a finger scrolls the page until the drawing has been tapped.
const fingers = new Map();
let moved = false;
const apart = () => {
  const [a, b] = [...fingers.values()];
  return Math.hypot(a.x - b.x, a.y - b.y);
};
function onWheel(event) {
  if (!event.ctrlKey && !picture.contains(document.activeElement)) return; // the page scrolls then
  event.preventDefault();
  const box = picture.getBoundingClientRect();
  zoom(
    Math.exp(Math.sign(event.deltaY) * 0.18),
    view.x + ((event.clientX - box.left) / box.width) * view.width,
    view.y + ((event.clientY - box.top) / box.height) * view.height,
  );
}
function onMove(event) {
  const last = fingers.get(event.pointerId);
  if (!last) return;
  const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
  if (!moved && Math.hypot(dx, dy) < 4) return;
  moved = true;
  picture.classList.add('moving');
  const before = fingers.size === 2 ? apart() : 0;
  fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  if (before && apart()) zoom(before / apart());
  else if (fingers.size === 1)
    pan((-dx * view.width) / picture.clientWidth, (-dy * view.height) / picture.clientHeight);
}
function listenToView() {
  picture.addEventListener('wheel', onWheel, { passive: false });
  picture.addEventListener('pointerdown', (event) => {
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    moved = false;
  });
  addEventListener('pointermove', onMove);
  for (const name of ['pointerup', 'pointercancel']) {
    addEventListener(name, (event) => {
      fingers.delete(event.pointerId);
      picture.classList.remove('moving');
    });
  }
  picture.addEventListener('keydown', (event) => {
    const step = view.width / 10;
    const act = {
      '+': () => zoom(0.8),
      '=': () => zoom(0.8),
      '-': () => zoom(1.25),
      0: fit,
      ArrowLeft: () => pan(-step, 0),
      ArrowRight: () => pan(step, 0),
      ArrowUp: () => pan(0, -step),
      ArrowDown: () => pan(0, step),
    }[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  by('zoom-in').addEventListener('click', () => zoom(0.8));
  by('zoom-out').addEventListener('click', () => zoom(1.25));
  by('zoom-fit').addEventListener('click', fit);
  addEventListener('resize', fit);
}

// Search: what matches is framed, the rest fades; Enter goes from one to the next.
let hits = [];
let hit = -1;
function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  hits = [];
  hit = -1;
  for (const region of data.regions) {
    const all = [region.name, region.device, region.partition, ...region.ops, ...region.nodes, ...region.outputs]
      .join(' ')
      .toLowerCase();
    const found = words.length > 0 && words.every((word) => all.includes(word));
    nodes.get(region.name).classList.toggle('hit', found);
    nodes.get(region.name).classList.toggle('dim', words.length > 0 && !found);
    if (found) hits.push(region.name);
  }
  by('found').textContent = words.length ? `${hits.length} of ${data.regions.length}` : '';
}
function listenToSearch() {
  by('search').addEventListener('input', (event) => search(event.target.value));
  by('search').addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || !hits.length) return;
    hit = (hit + (event.shiftKey ? -1 : 1) + hits.length) % hits.length;
    choose(hits[hit], 'search');
  });
}

listeners.push((name, from) => {
  for (const [region, node] of nodes) {
    node.classList.toggle('chosen', region === name);
    if (region === name) node.setAttribute('tabindex', 0);
    else node.setAttribute('tabindex', -1);
  }
  for (const [edge, path] of edges) path.classList.toggle('chosen', edge.source === name || edge.destination === name);
  if (from !== 'graph') bringIntoView(name);
  details(regions.get(name));
});

function details(region) {
  const box = by('details');
  if (!region) {
    box.replaceChildren(
      el(
        'p',
        { class: 'muted' },
        'Choose a region: what it computes, what it costs on each device, and why it runs where it does.',
      ),
    );
    return;
  }
  const row = (name, ...content) => [el('dt', {}, name), el('dd', {}, ...content)];
  const moved = traffic(region);
  const took = value(region.observed);
  box.replaceChildren(
    ...[
      el('h3', {}, region.name),
      el('p', {}, chip(region.device), ` in ${region.partition}`),
      region.reason ? el('p', {}, region.reason) : null,
      el(
        'dl',
        {},
        ...row('observed', ...figure(ms, region.observed)),
        ...row('timed', region.about),
        ...(region.predicted ? row('predicted', ...figure(ms, region.predicted)) : []),
        ...(region.energy ? row('energy', ...figure(mj, region.energy)) : []),
        ...row('operations', count(region.operations)),
        ...row('inputs', bytes(region.bytes_in)),
        ...row('outputs', bytes(region.bytes_out)),
        ...row('weights', bytes(region.weights)),
        ...row('intensity', moved && region.operations ? `${digits(region.operations / moved)} op/byte` : missing),
        ...(took && region.operations ? row('reached', rate('op/s')((region.operations / took) * 1e3)) : []),
        ...row('values', region.outputs.join(', ')),
      ),
      ...costs(region),
      ...refusals(region),
      el('h4', {}, 'Nodes'),
      el(
        'ul',
        {},
        ...region.ops.map((op, at) => el('li', {}, op, ' ', el('code', { class: 'muted' }, region.nodes[at]))),
      ),
    ].filter(Boolean),
  );
}

function costs(region) {
  const known = Object.entries(region.costs).sort(([, a], [, b]) => a.value - b.value);
  if (!known.length) return [];
  return [
    el('h4', {}, 'Cost alone on each device'),
    el(
      'table',
      {},
      el(
        'tbody',
        {},
        ...known.map(([name, cost]) =>
          el(
            'tr',
            {},
            el('td', {}, chip(name), name === region.device ? ' \u2190 here' : ''),
            el('td', { class: 'n' }, ...figure(ms, cost)),
          ),
        ),
      ),
    ),
  ];
}

function refusals(region) {
  const refused = Object.entries(region.refusals);
  if (!refused.length) return [];
  return [
    el('h4', {}, 'Not taken by'),
    el('ul', {}, ...refused.map(([name, why]) => el('li', {}, el('b', {}, name), `: ${why}`))),
  ];
}
