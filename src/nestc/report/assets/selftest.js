// With #test in the address the page uses itself as a person would and writes what it found into its first element.
if (location.hash === '#test') {
  const results = {};
  const click = (element) => element.dispatchEvent(new MouseEvent('click', { bubbles: true }));
  const key = (element, name) =>
    element.dispatchEvent(new KeyboardEvent('keydown', { key: name, bubbles: true, cancelable: true }));
  const first = data.regions[0];
  click(nodes.get(first.name));
  results.details =
    by('details').querySelector('h3').textContent === first.name && rows.get(first.name).classList.contains('chosen');
  const heads = by('table').tHead.rows[0].cells;
  click(heads[8].querySelector('button'));
  const work = [...by('table').tBodies[0].rows].map((row) => regions.get(row.dataset.region).operations ?? -1);
  results.sorted =
    heads[8].getAttribute('aria-sort') === 'descending' && work.every((each, at) => !at || work[at - 1] >= each);
  by('filter').value = first.name;
  filter();
  results.filtered = [...rows.values()].filter((row) => !row.hidden).length >= 1 && !rows.get(first.name).hidden;
  by('filter').value = '';
  filter();
  const before = root.dataset.theme;
  click(by('theme'));
  results.theme = root.dataset.theme !== before;
  click(by('theme'));
  const { width } = view;
  click(by('zoom-in'));
  results.zoomed = view.width < width;
  key(picture, '0');
  results.fitted = view.width === width;
  const { x } = view;
  key(picture, 'ArrowRight');
  results.moved = view.x > x;
  search(first.name);
  results.searched = hits.includes(first.name);
  search('');
  click(by('time-in'));
  results.stretched = stretch > 1;
  click(by('time-fit'));
  const next = data.edges.find((edge) => edge.source === first.name && edge.destination);
  if (next) {
    key(nodes.get(first.name), 'ArrowDown');
    results.walked = document.activeElement === nodes.get(next.destination);
  }
  root.dataset.test = JSON.stringify(results);
}
