// A table whose columns sort, which shows the first rows until more are wanted.

// Each column: {key, title, left, value: row => what it sorts by, cell: row => what it shows}.
function plainTable(label, columns, rows) {
  return h('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': label}, h('table', {'aria-label': label},
    h('thead', {}, h('tr', {}, columns.map(column => h('th', {scope: 'col', class: column.left && 'l'}, column.title)))),
    h('tbody', {}, rows.map(row => h('tr', {}, columns.map((column, index) =>
      h(index === 0 ? 'th' : 'td', {scope: index === 0 ? 'row' : null, class: column.left && 'l'}, column.cell(row))))))));
}

const folded = (title, table) => h('details', {}, h('summary', {}, title), table);

function compare(a, b) {
  return typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b), 'en', {numeric: true});
}

// What is missing stands last, whichever way one sorts.
function sorted(rows, column, descending) {
  const keyed = rows.map(row => [column.value(row), row]);
  const known = keyed.filter(([key]) => key !== null && key !== undefined);
  const missing = keyed.filter(([key]) => key === null || key === undefined);
  known.sort((a, b) => (descending ? -1 : 1) * compare(a[0], b[0]));
  return [...known, ...missing].map(([, row]) => row);
}

function sortHead(columns, order, resort) {
  return h('thead', {}, h('tr', {}, columns.map(column => h('th', {
    scope: 'col', class: column.left && 'l',
    'aria-sort': order.key === column.key ? (order.descending ? 'descending' : 'ascending') : null,
  }, h('button', {type: 'button', 'data-focus': `sort-${column.key}`, onclick: () => resort(
    order.key === column.key ? {key: column.key, descending: !order.descending} : {key: column.key, descending: !!column.big},
  )}, column.title)))));
}
