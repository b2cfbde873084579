// The overview, accuracy, light and dark, and the order in which everything is drawn.
function card(what, content, ...more) {
  return el(
    'div',
    { class: 'figure' },
    el('div', { class: 'what' }, what),
    el('div', { class: 'value' }, ...content),
    ...more.filter(Boolean).map((text) => el('div', { class: 'more' }, ...[text].flat())),
  );
}

function compared(off) {
  if (off > 1) return `observed takes ${digits(1 + off)} times as long`;
  return `observed takes ${digits(100 * Math.abs(off))} % ${off < 0 ? 'less' : 'more'}`;
}

function drawOverview() {
  by('model').textContent = data.model;
  const { nestc } = data.versions;
  const threads = data.threads === 1 ? 'one thread' : `${data.threads} threads`;
  by('about').textContent = `For ${data.objective} on ${devices.join(', ')}; ${threads} of ${data.processor}`;
  by('foot').textContent = words(
    `nestc ${nestc || ''}, ${data.date}. Placement: ${data.method}.`,
    'Measured: timed here. Modelled: from a simulator of the device. Estimated: assumed.',
  );
  const throughput = data.objective === 'throughput';
  const energy = data.objective === 'energy';
  const flying = data.timelines.find((each) => each.per_second);
  const observed = throughput ? (flying ? 1e3 / flying.per_second.value : null) : data.latency.value;
  const off = data.predicted && observed ? observed / data.predicted.value - 1 : null;
  const bound = data.lower_bound;
  const promised = energy ? data.predicted_energy : data.predicted;
  const gap = bound && promised && bound.value ? promised.value / bound.value - 1 : null;
  const cards = [
    card(
      'Observed latency',
      [ms(data.latency.value)],
      kind(data.latency.kind),
      `median of ${data.runs} ${data.runs === 1 ? 'run' : 'runs'}`,
    ),
  ];
  if (flying)
    cards.push(
      card(
        'Observed, pipelined',
        [`${digits(flying.per_second.value)} /s`],
        kind(flying.per_second.kind),
        `${flying.requests} requests in flight, ${ms(1e3 / flying.per_second.value)} each`,
      ),
    );
  if (data.predicted)
    cards.push(
      card(
        throughput ? 'Predicted, pipelined' : 'Predicted latency',
        [throughput ? `${digits(1e3 / data.predicted.value)} /s` : ms(data.predicted.value)],
        kind(data.predicted.kind),
        throughput ? `${ms(data.predicted.value)} a request` : null,
        off === null ? null : compared(off),
      ),
    );
  if (bound)
    cards.push(
      card(
        'Lower bound',
        [(energy ? mj : ms)(bound.value)],
        kind(bound.kind),
        data.optimal
          ? 'the plan is optimal by these costs'
          : gap === null
            ? null
            : `the plan is at most ${gap < 5e-6 ? '0.001' : digits(100 * gap)} % above the best`,
      ),
    );
  if (data.energy)
    cards.push(
      card(
        'Energy an inference',
        [mj(data.energy.value)],
        kind(data.energy.kind),
        data.energy_without.length ? `without ${unknownEnergy()}, of which nothing states it` : null,
        data.predicted_energy ? `predicted ${mj(data.predicted_energy.value)}` : null,
      ),
    );
  cards.push(
    card(
      'Regions',
      [String(data.regions.length)],
      `in ${data.partitions.length} ${data.partitions.length === 1 ? 'partition' : 'partitions'}`,
    ),
  );
  const work = data.regions.map((region) => region.operations);
  if (!work.includes(null))
    cards.push(card('Operations', [count(work.reduce((a, b) => a + b, 0))], 'a multiply-add counts two'));
  by('figures').replaceChildren(...cards);
  by('devices').replaceChildren(deviceTable());
  const notes = [];
  const singles = Object.entries(data.single_device_ms);
  if (singles.length) {
    const each = singles.map(([name, took]) => `${name} ${ms(took)}`).join(', ');
    notes.push(`All on one device, as far as it takes it, and the rest on the CPU: ${each} (predicted).`);
  }
  const kept = Object.entries(data.fallback_ops);
  if (kept.length) notes.push(`Interpreted, not compiled: ${kept.map(([op, many]) => `${op} ${many}`).join(', ')}.`);
  for (const [node, channels] of Object.entries(data.splits)) {
    notes.push(`Split by output channels, so that several devices can share it: ${node}, ${channels.join(' and ')}.`);
  }
  by('notes').replaceChildren(...notes.map((text) => el('p', {}, text)));
  by('legend').replaceChildren(
    ...data.devices.map((device) =>
      chip(device.name, `${device.name}${device.kind.includes('modelled') ? ', modelled' : ''}`),
    ),
  );
}

function unknownEnergy() {
  const found = data.energy_without.filter((name) => devices.includes(name));
  return [...found, ...(found.length < data.energy_without.length ? ['the links'] : [])].join(', ');
}

function deviceTable() {
  const heads = ['Device', 'Regions', 'Partitions', 'Busy an inference', 'Energy', 'Link'];
  const classes = ['', 'n', 'n', 'n', 'n', ''];
  return el(
    'table',
    {},
    el('thead', {}, el('tr', {}, ...heads.map((name, at) => el('th', { class: classes[at], scope: 'col' }, name)))),
    el(
      'tbody',
      {},
      ...data.devices.map((device) =>
        el(
          'tr',
          {},
          ...[
            [chip(device.name), device.resource !== device.name ? ` on ${device.resource}` : ''],
            [String(device.regions)],
            [String(device.partitions)],
            figure(ms, device.busy),
            figure(mj, device.energy),
            [device.link || 'works in the host\u2019s memory'],
          ].map((content, at) => el('td', { class: classes[at] }, ...content)),
        ),
      ),
    ),
  );
}

function drawAccuracy() {
  if (!data.accuracy.length) {
    by('accuracies').replaceChildren(
      el(
        'p',
        { class: 'muted' },
        words(
          'Not judged. nestc report BUNDLE --data DATA --labels LABELS --against FLOAT_MODEL shows how many samples',
          'are classified rightly, by this model and by the float one, and how near their outputs are.',
        ),
      ),
    );
    return;
  }
  const fraction = (metric) => metric.startsWith('top');
  const format = (metric) =>
    maybe(
      metric === 'sqnr'
        ? (v) => `${digits(v)} dB`
        : fraction(metric)
          ? (v) => `${(100 * v).toFixed(2)} %`
          : (v) => v.toFixed(6),
    );
  const span = (metric, ends) => (ends ? ` (95 %: ${ends.map((end) => (100 * end).toFixed(1)).join(' to ')})` : '');
  by('accuracies').replaceChildren(
    el(
      'div',
      { class: 'scroll' },
      el(
        'table',
        {},
        el(
          'thead',
          {},
          el(
            'tr',
            {},
            ...['Measure', 'This model', 'Reference', 'Decided otherwise', 'Samples', 'Data'].map((name) =>
              el('th', { scope: 'col' }, name),
            ),
          ),
        ),
        el(
          'tbody',
          {},
          ...data.accuracy.map((each) =>
            el(
              'tr',
              {},
              el(
                'td',
                {},
                { top1: 'top-1', top5: 'top-5', sqnr: 'SQNR', cosine: 'cosine' }[each.metric] || each.metric,
              ),
              el(
                'td',
                {},
                each.value === null && each.metric === 'sqnr' ? 'equal' : format(each.metric)(each.value),
                span(each.metric, each.interval),
              ),
              el(
                'td',
                {},
                each.against
                  ? [
                      each.against,
                      each.reference === null ? '' : `: ${format(each.metric)(each.reference)}`,
                      span(each.metric, each.reference_interval),
                    ]
                  : missing,
              ),
              el(
                'td',
                {},
                each.disagreements === null
                  ? missing
                  : `${each.disagreements} of ${each.samples} (${percent(each.disagreements / each.samples)})`,
              ),
              el('td', {}, String(each.samples)),
              el('td', {}, each.data),
            ),
          ),
        ),
      ),
    ),
  );
}

function setTheme(dark) {
  root.dataset.theme = dark ? 'dark' : 'light';
  by('theme').textContent = dark ? 'Light' : 'Dark';
  by('theme').setAttribute('aria-pressed', String(dark));
}
function listenToTheme() {
  const system = matchMedia('(prefers-color-scheme: dark)');
  let own = false;
  setTheme(system.matches);
  system.addEventListener('change', () => {
    if (!own) setTheme(system.matches);
  });
  by('theme').addEventListener('click', () => {
    own = true;
    setTheme(root.dataset.theme !== 'dark');
  });
}

listenToTheme();
drawOverview();
drawGraph();
fit();
listenToView();
listenToSearch();
details(null);
describeTimeline();
drawTimeline();
listenToTimeline();
drawRoofs();
addEventListener('resize', drawRoofs);
drawTable();
drawPredictions();
drawAccuracy();
root.dataset.drawn = 'yes';
