// Timeline, rooflines, and predictions beside what was observed.
const LANE = 44;
const TOP = 28;
let stretch = 1;

function ticks(least, most, wanted) {
  const rough = (most - least) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(least / step) * step; at <= most * 1.0001; at += step) found.push(at);
  return found;
}

// The timeline that is shown: one inference, or several requests in flight.
let timeline = data.timelines[0];

function laneKind(lane) {
  const kinds = new Set(timeline.marks.filter((mark) => mark.lane === lane).map((mark) => mark.kind));
  return [...kinds].join(' + ');
}
const laneColour = (lane) => colour(lane.split('->').find((end) => devices.includes(end)) || lane);

function describeTimeline() {
  const assumed = timeline.lanes.some((lane) => laneKind(lane) !== 'measured');
  const pace = timeline.per_second;
  by('timeline-about').textContent = words(
    timeline.requests > 1
      ? `${timeline.requests} requests in flight: ${digits(pace.value)} a second (${pace.kind}).`
      : `One inference, the run of the median latency of ${data.runs}.`,
    assumed && 'What is hatched is not measured: the device is simulated, or its link assumed, and that time stands',
    assumed ? 'where a measured one would.' : 'All of it is measured.',
    'Within a partition its regions are drawn in order, as long as their own times, where these are known; what is',
    'left before them is the launch and the like.',
  );
}

function drawTimeline() {
  const end = Math.max(1e-9, ...timeline.marks.map((mark) => mark.end_us));
  const many = timeline.requests > 1;
  const names = el(
    'div',
    { class: 'names' },
    ...timeline.lanes.map((lane) =>
      el(
        'div',
        {},
        devices.includes(lane) ? chip(lane) : el('span', {}, lane.replace('->', ' \u2192 ')),
        el('small', {}, laneKind(lane)),
      ),
    ),
  );
  const frame = el('div', {
    class: 'view',
    tabindex: 0,
    role: 'group',
    'aria-label': 'Timeline; scroll sideways when zoomed',
  });
  by('lanes').replaceChildren(names, frame);
  const width = Math.max(240, (frame.clientWidth || 700) - 2) * stretch;
  const height = TOP + LANE * timeline.lanes.length + 6;
  const x = (us) => 8 + (us / end) * (width - 24);
  const chart = svg(
    'svg',
    { width, height, viewBox: `0 0 ${width} ${height}`, role: 'group', 'aria-label': 'When each device runs what' },
    svg(
      'defs',
      {},
      svg(
        'pattern',
        { id: 'hatch', width: 7, height: 7, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(45)' },
        svg('line', { x1: 0, y1: 0, x2: 0, y2: 7, class: 'hatch' }),
      ),
    ),
  );
  for (const at of ticks(0, end, Math.max(2, width / 130))) {
    chart.append(svg('line', { class: 'grid', x1: x(at), x2: x(at), y1: TOP - 6, y2: height }));
    if (x(at) < width - 50)
      chart.append(svg('text', { class: 'faint', x: x(at) + 3, y: TOP - 10 }, at ? ms(at / 1e3) : '0'));
  }
  for (const mark of timeline.marks) drawMark(chart, mark, x, many);
  frame.append(chart);
  const numbers = many ? [...new Set(timeline.marks.map((mark) => mark.request))] : [];
  by('lanes-legend').replaceChildren(
    ...numbers.map((number) => el('span', { class: `chip c${number % 8}` }, `request ${number + 1}`)),
  );
}

function drawMark(chart, mark, x, many) {
  const top = TOP + LANE * timeline.lanes.indexOf(mark.lane) + 7;
  const partition = mark.bytes === null ? partitions.get(mark.name) : undefined;
  const tone = many ? `c${mark.request % 8}` : laneColour(mark.lane);
  const left = x(mark.begin_us);
  const wide = Math.max(1.5, x(mark.end_us) - left);
  const place = { x: left, y: top, width: wide, height: LANE - 14, rx: 2 };
  const took = (mark.end_us - mark.begin_us) / 1e3;
  const text = lines(
    `${mark.name} on ${mark.lane}`,
    many && `request ${mark.request + 1}`,
    mark.bytes !== null && bytes(mark.bytes),
    mark.instead_of && `instead of ${mark.instead_of}, which failed`,
    `${ms(mark.begin_us / 1e3)} to ${ms(mark.end_us / 1e3)}: ${ms(took)}, ${mark.kind}`,
  );
  const bar = tip(svg('rect', { class: `mark ${tone} ${mark.kind}`, ...place, tabindex: 0, 'aria-label': text }), text);
  chart.append(bar);
  if (mark.kind !== 'measured') chart.append(svg('rect', { ...place, fill: 'url(#hatch)', 'pointer-events': 'none' }));
  if (!partition) return;
  const inside = partition.regions.map((name) => regions.get(name)).filter((region) => region && region.observed);
  const whole = inside.reduce((sum, region) => sum + region.observed.value, 0);
  if (inside.length > 1 && whole > 0) {
    // What is left of the bar is its begin: the launch, and what the host does.
    const scale = wide / Math.max(whole, took);
    let at = left + wide - whole * scale;
    for (const region of inside) {
      const own = region.observed.value * scale;
      const piece = tip(
        svg('rect', { class: own > 4 ? 'part wide' : 'part', x: at, y: top, width: own, height: LANE - 14 }),
        `${region.name}\n${ms(region.observed.value)}, ${region.observed.kind} (${region.about})\nin ${text}`,
      );
      piece.addEventListener('click', () => choose(region.name, 'timeline'));
      chart.append(piece);
      at += own;
    }
  } else if (partition.regions.length) {
    bar.addEventListener('click', () => choose(partition.regions[0], 'timeline'));
  }
}

function listenToTimeline() {
  const set = (factor) => {
    stretch = factor === null ? 1 : Math.min(64, Math.max(1, stretch * factor));
    const frame = by('lanes').querySelector('.view');
    const middle = (frame.scrollLeft + frame.clientWidth / 2) / frame.scrollWidth;
    drawTimeline();
    const now = by('lanes').querySelector('.view');
    now.scrollLeft = middle * now.scrollWidth - now.clientWidth / 2;
  };
  by('time-in').addEventListener('click', () => set(1.6));
  by('time-out').addEventListener('click', () => set(1 / 1.6));
  by('time-fit').addEventListener('click', () => set(null));
  addEventListener('resize', drawTimeline);
  by('time-which').hidden = data.timelines.length < 2;
  by('time-which').append(
    ...data.timelines.map((each, at) =>
      el('option', { value: at }, each.requests > 1 ? `${each.requests} requests in flight` : 'one inference'),
    ),
  );
  by('time-which').addEventListener('change', (event) => {
    timeline = data.timelines[event.target.value];
    describeTimeline();
    drawTimeline();
  });
}

// Rooflines: logarithmic both ways.
const PLOT = { width: 560, height: 360, left: 74, right: 14, top: 14, bottom: 44 };
const narrow = (box) => Math.min(560, Math.max(300, (box.clientWidth || 600) - 40)); // so that letters keep their size
const points = new Map();

function drawRoofs() {
  PLOT.width = narrow(by('roofs'));
  points.clear();
  const drawn = data.devices.map(drawRoof).filter(Boolean);
  by('roofs').replaceChildren(
    ...(drawn.length ? drawn : [el('p', { class: 'muted' }, 'No region has both operations and a time of its own.')]),
  );
}

function drawRoof(device) {
  const own = data.regions
    .filter((region) => region.device === device.name && value(region.observed) && intensity(region))
    .map((region) => ({
      name: region.name,
      region,
      x: intensity(region),
      y: (region.operations / region.observed.value) * 1e3,
      kind: region.observed.kind,
    }));
  const wholes = data.partitions
    .filter(
      (part) =>
        part.regions.length > 1 && part.device === device.name && part.operations && part.bytes && value(part.observed),
    )
    .map((part) => ({
      name: part.name,
      x: part.operations / part.bytes,
      y: (part.operations / part.observed.value) * 1e3,
      kind: part.observed.kind,
    }));
  const all = [...own, ...wholes];
  if (!all.length) return null;
  const formats = new Set(
    data.regions.filter((region) => region.device === device.name && region.operations).map((region) => region.numbers),
  );
  const known = device.roof ? device.roof.ceilings.filter((each) => formats.has(each.numbers)) : [];
  const roof = device.roof ? { ...device.roof, ceilings: known.length ? known : device.roof.ceilings } : null;
  const ridge = roof ? roof.ceilings.map((each) => each.per_second / roof.bytes_per_second) : [];
  const xs = [...all.map((point) => point.x), ...ridge];
  const ys = [...all.map((point) => point.y), ...(roof ? roof.ceilings.map((each) => each.per_second) : [])];
  const [x0, x1] = decades(xs);
  const [y0, y1] = decades(ys);
  const place = (from, to, low, high) => (v) =>
    low + ((Math.log10(v) - Math.log10(from)) / (Math.log10(to) - Math.log10(from))) * (high - low);
  const x = place(x0, x1, PLOT.left, PLOT.width - PLOT.right);
  const y = place(y0, y1, PLOT.height - PLOT.bottom, PLOT.top);
  const chart = svg('svg', {
    viewBox: `0 0 ${PLOT.width} ${PLOT.height}`,
    role: 'group',
    'aria-label': `Roofline of ${device.name}`,
  });
  for (let at = x0; at <= x1 * 1.01; at *= 10) {
    chart.append(
      svg('line', { class: 'grid', x1: x(at), x2: x(at), y1: PLOT.top, y2: PLOT.height - PLOT.bottom }),
      svg('text', { class: 'faint', x: x(at), y: PLOT.height - PLOT.bottom + 16, 'text-anchor': 'middle' }, count(at)),
    );
  }
  for (let at = y0; at <= y1 * 1.01; at *= 10) {
    chart.append(
      svg('line', { class: 'grid', x1: PLOT.left, x2: PLOT.width - PLOT.right, y1: y(at), y2: y(at) }),
      svg('text', { class: 'faint', x: PLOT.left - 6, y: y(at) + 4, 'text-anchor': 'end' }, rate('op/s')(at)),
    );
  }
  chart.append(
    svg(
      'text',
      { class: 'faint', x: (PLOT.left + PLOT.width) / 2, y: PLOT.height - 8, 'text-anchor': 'middle' },
      'operations a byte',
    ),
  );
  if (roof) drawCeilings(chart, roof, x, y, x0, x1, y0);
  for (const point of own) chart.append(drawPoint(point, device, x, y));
  for (const point of wholes) {
    const [cx, cy] = [x(point.x), y(point.y)];
    chart.append(
      tip(
        svg('path', {
          class: `point ${colour(device.name)}`,
          d: `M${cx} ${cy - 8}L${cx + 8} ${cy}L${cx} ${cy + 8}L${cx - 8} ${cy}z`,
        }),
        `partition ${point.name} as a whole\n${digits(point.x)} op/byte, ${rate('op/s')(point.y)}, ${point.kind}`,
      ),
    );
  }
  const most = (region) =>
    (roof.ceilings.find((each) => each.numbers === region.numbers) || roof.ceilings[0]).per_second;
  const above =
    roof && own.some((point) => point.y > 1.01 * Math.min(most(point.region), point.x * roof.bytes_per_second));
  const reached = roof
    ? own.map((point) => [point.name, point.y / most(point.region)]).sort(([, a], [, b]) => b - a)[0]
    : null;
  return el(
    'figure',
    {},
    el('h3', {}, chip(device.name)),
    chart,
    el(
      'figcaption',
      {},
      `A circle is a region${wholes.length ? ', a diamond a partition as a whole' : ''}; times ${device.kind}. `,
      reached ? `The best, ${reached[0]}, reaches ${percent(reached[1])} of the ceiling of its numbers. ` : '',
      above && device.kind.includes('modelled')
        ? 'Where a point lies above a line, the machine worked on it while the layer before it ended. '
        : '',
      roof ? `Ceilings ${roof.kind}: ${roof.source}.` : 'Nothing states what this device can do at most.',
    ),
  );
}

function decades(values) {
  const known = values.filter((each) => each > 0);
  const [low, high] = [
    Math.floor(Math.log10(Math.min(...known) * 0.7)),
    Math.ceil(Math.log10(Math.max(...known) * 1.02)),
  ];
  return [10 ** low, 10 ** Math.max(high, low + 1)];
}

function drawCeilings(chart, roof, x, y, x0, x1, y0) {
  const sorted = [...roof.ceilings].sort((a, b) => b.per_second - a.per_second);
  sorted.forEach((ceiling, number) => {
    const ridge = ceiling.per_second / roof.bytes_per_second;
    const begin = Math.max(x0, y0 / roof.bytes_per_second);
    const slope = number === 0 ? `M${x(begin)} ${y(Math.max(y0, begin * roof.bytes_per_second))}L` : 'M';
    chart.append(
      svg('path', {
        class: `roof ${number ? 'other' : ''}`,
        d: `${slope}${x(Math.max(ridge, x0))} ${y(ceiling.per_second)}L${x(x1)} ${y(ceiling.per_second)}`,
      }),
      svg(
        'text',
        { class: 'faint', x: x(x1) - 4, y: y(ceiling.per_second) - 5, 'text-anchor': 'end' },
        `${ceiling.numbers}: ${rate('op/s')(ceiling.per_second)}`,
      ),
    );
  });
  const at = Math.max(x0, y0 / roof.bytes_per_second) * 1.3;
  chart.append(
    svg(
      'text',
      { class: 'faint', x: x(at) + 8, y: y(Math.max(y0, at * roof.bytes_per_second)) + 12 },
      rate('B/s')(roof.bytes_per_second),
    ),
  );
}

function drawPoint(point, device, x, y) {
  const text = lines(
    point.name,
    operators(point.region),
    `${digits(point.x)} op/byte, ${rate('op/s')(point.y)}`,
    `${ms(point.region.observed.value)}, ${point.kind}`,
  );
  const circle = tip(
    svg('circle', {
      class: `point ${colour(device.name)}`,
      cx: x(point.x),
      cy: y(point.y),
      r: 5,
      tabindex: 0,
      role: 'button',
      'aria-label': text,
    }),
    text,
  );
  circle.addEventListener('click', () => choose(point.name, 'roof'));
  circle.addEventListener('keydown', (event) => {
    if (event.key === 'Enter') choose(point.name, 'roof');
  });
  points.set(point.name, circle);
  return circle;
}
listeners.push((name) => {
  for (const [region, circle] of points) circle.classList.toggle('chosen', region === name);
});

// Predictions: a pair of bars a partition, and a point a region.
function drawPredictions() {
  const parts = data.partitions.filter((part) => part.predicted && part.observed);
  const own = data.regions.filter(
    (region) => region.predicted && region.observed && region.predicted.value > 0 && region.observed.value > 0,
  );
  const shown = [];
  if (data.predicted) {
    const flying = data.timelines.find((each) => each.per_second);
    const seen =
      data.objective !== 'throughput'
        ? [', and a run takes ', ...figure(ms, data.latency)]
        : flying
          ? [
              ' a request, pipelined, and one takes ',
              ...figure(ms, { ...flying.per_second, value: 1e3 / flying.per_second.value }),
            ]
          : [' a request, pipelined'];
    shown.push(el('p', {}, 'The plan promises ', ...figure(ms, data.predicted), ...seen, '.'));
  }
  if (parts.length) shown.push(drawPairs(parts));
  if (own.length > 1) shown.push(drawScatter(own));
  if (!parts.length && own.length < 2) {
    shown.push(
      el(
        'p',
        { class: 'muted' },
        words(
          `The plan of this bundle holds no times (${data.method}). Compile for several targets, or with a plan of`,
          'nestc partition, to have costs measured and predictions made.',
        ),
      ),
    );
  }
  by('predicted').replaceChildren(...shown);
}

function bothTimes(it) {
  const told = (what, figure_) => `${what} ${ms(figure_.value)} (${figure_.kind})`;
  return lines(it.name, told('predicted', it.predicted), told('observed', it.observed));
}

function drawPairs(parts) {
  const most = Math.max(...parts.flatMap((part) => [part.predicted.value, part.observed.value]));
  const pairs = el('div', { class: 'pairs', role: 'list' });
  for (const part of parts) {
    const text = bothTimes(part);
    pairs.append(
      el(
        'div',
        { role: 'listitem' },
        chip(part.device, part.name),
        el(
          'div',
          { class: 'muted' },
          `${ms(part.predicted.value)} predicted, ${ms(part.observed.value)} ${part.observed.kind}`,
        ),
      ),
      el(
        'div',
        { class: 'track' },
        tip(
          svg(
            'svg',
            {
              viewBox: '0 0 1000 34',
              preserveAspectRatio: 'none',
              class: colour(part.device),
              role: 'img',
              'aria-label': text,
            },
            svg('rect', {
              class: 'bar-predicted',
              x: 1,
              y: 4,
              width: Math.max(2, (part.predicted.value / most) * 990),
              height: 10,
              'vector-effect': 'non-scaling-stroke',
            }),
            svg('rect', {
              class: 'bar-observed',
              x: 1,
              y: 19,
              width: Math.max(2, (part.observed.value / most) * 990),
              height: 10,
            }),
          ),
          text,
        ),
      ),
    );
  }
  return el('div', {}, pairs, el('p', { class: 'muted' }, 'Outlined: predicted. Filled: observed.'));
}

function drawScatter(own) {
  const values = own.flatMap((region) => [region.predicted.value, region.observed.value]);
  const [low, high] = decades(values);
  const size = { width: narrow(by('predicted')), height: 380, left: 74, right: 16, top: 12, bottom: 46 };
  const log = (v) => (Math.log10(v) - Math.log10(low)) / (Math.log10(high) - Math.log10(low));
  const x = (v) => size.left + log(v) * (size.width - size.left - size.right);
  const y = (v) => size.height - size.bottom - log(v) * (size.height - size.top - size.bottom);
  const chart = svg('svg', {
    viewBox: `0 0 ${size.width} ${size.height}`,
    role: 'group',
    'aria-label': 'Predicted and observed times of regions',
  });
  for (let at = low; at <= high * 1.01; at *= 10) {
    chart.append(
      svg('line', { class: 'grid', x1: x(at), x2: x(at), y1: y(low), y2: y(high) }),
      svg('line', { class: 'grid', x1: x(low), x2: x(high), y1: y(at), y2: y(at) }),
      svg('text', { class: 'faint', x: x(at), y: size.height - size.bottom + 16, 'text-anchor': 'middle' }, ms(at)),
      svg('text', { class: 'faint', x: size.left - 6, y: y(at) + 4, 'text-anchor': 'end' }, ms(at)),
    );
  }
  chart.append(
    svg('line', { class: 'ideal', x1: x(low), y1: y(low), x2: x(high), y2: y(high) }),
    svg(
      'text',
      { class: 'faint', x: (size.left + size.width) / 2, y: size.height - 8, 'text-anchor': 'middle' },
      'predicted',
    ),
    svg('text', { class: 'faint', x: size.left + 6, y: size.top + 10 }, 'observed'),
  );
  for (const region of own) {
    const text = bothTimes(region);
    const point = tip(
      svg('circle', {
        class: `point ${colour(region.device)}`,
        cx: x(region.predicted.value),
        cy: y(region.observed.value),
        r: 5,
        tabindex: 0,
        role: 'button',
        'aria-label': text,
      }),
      text,
    );
    point.addEventListener('click', () => choose(region.name, 'predicted'));
    chart.append(point);
  }
  return el(
    'div',
    { class: 'roofs' },
    el('figure', {}, chart, el('figcaption', {}, 'A point is a region; on the line the prediction is right.')),
  );
}
