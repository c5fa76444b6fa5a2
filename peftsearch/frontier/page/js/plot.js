// What plots share: colours of the theme, symbols, axes, and a simple chart of lines.

const SYMBOLS = (() => {
  const polygon = (corners, radius, turn) => {
    const points = [];
    for (let index = 0; index < corners; index++) {
      const angle = (index / corners + turn) * 2 * Math.PI, r = Array.isArray(radius) ? radius[index % 2] : radius;
      points.push(`${(r * Math.sin(angle)).toFixed(3)},${(-r * Math.cos(angle)).toFixed(3)}`);
    }
    return `M${points.join('L')}Z`;
  };
  return [
    'M0,-1A1,1 0 1 1 0,1A1,1 0 1 1 0,-1Z',
    polygon(4, 1.2, 1 / 8),
    polygon(4, 1.25, 0),
    polygon(3, 1.35, 0),
    polygon(10, [1.5, 0.68], 0),
    polygon(5, 1.2, 0),
    polygon(6, 1.15, 0),
  ];
})();

let forced = null;
const isDark = () => forced === null ? matchMedia('(prefers-color-scheme: dark)').matches : forced === 'dark';
const methodColour = method => isDark() ? method.dark : method.colour;

// A colour of the style sheet as canvas wants it.
function ink(name) {
  const probe = h('i', {class: 'unseen'});
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const symbol = (method, x, y, radius, attributes) => s('path', {
  d: SYMBOLS[method.symbol], transform: `translate(${x.toFixed(2)} ${y.toFixed(2)}) scale(${radius})`,
  fill: methodColour(method), 'vector-effect': 'non-scaling-stroke', ...attributes,
});

const glyph = method => s('svg', {width: 12, height: 12, viewBox: '-1.6 -1.6 3.2 3.2', 'aria-hidden': 'true'},
  s('path', {d: SYMBOLS[method.symbol], fill: methodColour(method)}));

// Grid, ticks and titles of both axes.
function axes(width, height, x, y, margin, titles) {
  const right = width - margin.right, bottom = height - margin.bottom, group = s('g', {'aria-hidden': 'true'});
  for (const value of x.ticks(Math.max(2, Math.floor((right - margin.left) / 85)))) {
    const at = x.at(value).toFixed(1);
    group.append(s('line', {class: 'grid', x1: at, x2: at, y1: margin.top, y2: bottom}),
      s('text', {x: at, y: bottom + 17, 'text-anchor': 'middle'}, titles.xTick(value)));
  }
  const steps = y.ticks(Math.max(3, Math.floor((bottom - margin.top) / 37)));
  const digits = Math.max(0, ...steps.map(value => (String(value).split('.')[1] ?? '').length));
  for (const value of steps) {
    const at = y.at(value).toFixed(1);
    group.append(s('line', {class: 'grid', x1: margin.left, x2: right, y1: at, y2: at}),
      s('text', {x: margin.left - 7, y: Number(at) + 4, 'text-anchor': 'end'}, !y.log && Math.abs(value) < 1000 && digits < 7 ? value.toFixed(digits) : titles.yTick(value)));
  }
  group.append(s('line', {class: 'axis', x1: margin.left, x2: right, y1: bottom, y2: bottom}));
  if (titles.x) {
    group.append(s('text', {class: 'title', x: right, y: height - 6, 'text-anchor': 'end'}, titles.x));
  }
  if (titles.y) group.append(s('text', {class: 'title', x: 4, y: 12}, titles.y));
  return group;
}

const shortNumber = value => Math.abs(value) >= 1000 ? si(value) : String(Number(value.toPrecision(4)));

// Lines in one small plot. Each series: points [[x, y], ...], colour, and step, dots.
function lineChart(host, spec) {
  const width = Math.max(220, host.clientWidth), height = spec.height ?? 190;
  const margin = {left: 46, right: 14, top: 22, bottom: 39};
  const points = spec.series.flatMap(series => series.points);
  const xs = points.map(point => point[0]), ys = points.map(point => point[1]);
  const x = scale(false, Math.min(...xs, 0), Math.max(...xs, 1e-9), margin.left, width - margin.right);
  const log = spec.log && farApart(ys), [low, high] = reach(ys, log, 1e-4);
  const y = scale(log, spec.floor === undefined ? low : Math.min(spec.floor, low), high, height - margin.bottom, margin.top);
  const svg = s('svg', {width, height, role: 'img', 'aria-label': spec.label},
    axes(width, height, x, y, margin, {x: spec.x, y: spec.y, xTick: shortNumber, yTick: shortNumber}));
  for (const series of spec.series) {
    let path = '';
    series.points.forEach(([px, py], index) => {
      const [sx, sy] = [x.at(px).toFixed(1), y.at(py).toFixed(1)];
      path += index === 0 ? `M${sx},${sy}` : series.step ? `H${sx}V${sy}` : `L${sx},${sy}`;
    });
    svg.append(s('path', {class: 'curve', d: path, stroke: series.colour, 'stroke-dasharray': series.dash, opacity: series.opacity}));
    if (series.dots) {
      for (const [px, py] of series.points) {
        svg.append(s('circle', {cx: x.at(px).toFixed(1), cy: y.at(py).toFixed(1), r: 3.2, fill: series.colour},
          s('title', {}, `${spec.x} ${shortNumber(px)}: ${metricText(py)}`)));
      }
    }
  }
  host.replaceChildren(svg);
}
