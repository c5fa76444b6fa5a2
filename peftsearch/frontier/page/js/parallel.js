// Parallel coordinates: one line per trial, one axis per hyperparameter (of several methods: their names, and what all of
// them have), the metric at the right.

function dimensions(trials, domain, study) {
  const named = new Map(), several = new Set(trials.map(trial => trial.method)).size > 1;
  for (const trial of trials) for (const [name, value] of trial.settings) {
    if (!named.has(name)) named.set(name, new Map());
    named.get(name).set(trial, value);
  }
  const found = [];
  if (several) {
    const methods = [...new Set(trials.map(trial => trial.method))].sort((a, b) => a - b);
    found.push({title: 'method', numeric: false, distinct: methods, of: trial => trial.method, text: index => study.methods[index].name});
  }
  for (const [name, values] of named) {
    const distinct = [...new Set(values.values())];
    if (distinct.length < 2 || (several && values.size < trials.length)) continue;
    const numeric = distinct.every(value => typeof value === 'number');
    distinct.sort((a, b) => numeric ? a - b : String(a).localeCompare(String(b), 'en', {numeric: true}));
    found.push({title: name === 'learning_rate' ? 'lr' : name, numeric, distinct, of: trial => values.get(trial),
      text: value => valueText(name, value), log: numeric && farApart(distinct)});
  }
  const sizes = trials.map(trial => Math.max(trial.trainable_parameters, 1));
  if (new Set(sizes).size > 1) {
    found.push({title: 'parameters', numeric: true, distinct: [...new Set(sizes)].sort((a, b) => a - b),
      of: trial => Math.max(trial.trainable_parameters, 1), text: si, log: true});
  }
  const values = [...new Set(trials.map(trial => trial.value))].sort((a, b) => a - b);
  found.push({title: domain.title, numeric: true, distinct: values, of: trial => trial.value, text: metricText, log: domain.log && farApart(values)});
  return found;
}

function drawParallel(host, trials, domain, study, actions) {
  const width = Math.max(300, host.clientWidth), height = 300, margin = {left: 34, right: 44, top: 34, bottom: 14};
  const shown = trials.filter(trial => finished(trial));
  if (shown.length < 2) {
    host.replaceChildren(h('p', {class: 'small soft'}, 'Fewer than two of these trials are finished, so there is nothing to compare.'));
    return;
  }
  const axesOf = dimensions(shown, domain, study), step = axesOf.length > 1 ? (width - margin.left - margin.right) / (axesOf.length - 1) : 0;
  const svg = s('svg', {width, height, role: 'img', 'aria-label':
    `Parallel coordinates of ${shown.length} trials over ${axesOf.map(axis => axis.title).join(', ')}; the table of trials has the same numbers`});
  const canvas = h('canvas', {'aria-hidden': 'true'}), ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  axesOf.forEach((axis, index) => {
    const x = margin.left + index * step, {distinct} = axis;
    const range = scale(axis.log, distinct[0], distinct.at(-1), height - margin.bottom, margin.top);
    axis.x = x;
    axis.at = axis.numeric ? value => distinct.length === 1 ? (height - margin.bottom + margin.top) / 2 : range.at(value)
      : value => height - margin.bottom - (distinct.indexOf(value) + 0.5) / distinct.length * (height - margin.bottom - margin.top);
    const anchor = index === 0 ? 'start' : index === axesOf.length - 1 ? 'end' : 'middle', room = Math.max(5, Math.floor(step / 6.6));
    svg.append(s('line', {class: 'axis', x1: x, x2: x, y1: margin.top, y2: height - margin.bottom}),
      s('text', {class: 'title', x: anchor === 'start' ? 4 : anchor === 'end' ? width - 4 : x, y: 14, 'text-anchor': anchor}, clip(axis.title, room), s('title', {}, axis.title)));
    const marks = axis.numeric ? (distinct.length <= 6 ? distinct : [distinct[0], distinct.at(-1)]) : distinct;
    marks.slice(0, 12).forEach(value => svg.append(s('text', {class: 'halo', x: index === axesOf.length - 1 ? x + 5 : x + 5, y: axis.at(value) + 4},
      clip(axis.text(value), Math.max(4, Math.floor(step / 7))))));
  });
  // A trial without one of the hyperparameters has no line through that axis.
  const lineOf = trial => axesOf.filter(axis => axis.of(trial) !== undefined).map(axis => [axis.x, axis.at(axis.of(trial))]);
  const lines = shown.map(trial => [trial, lineOf(trial)]);
  const pen = canvas.getContext('2d'), order = [...lines].sort((a, b) => domain.better * (a[0].value - b[0].value));
  pen.scale(ratio, ratio);
  const trace = line => { pen.beginPath(); line.forEach(([x, y], index) => index ? pen.lineTo(x, y) : pen.moveTo(x, y)); pen.stroke(); };
  const weak = ink('edge');
  order.forEach(([trial, line], rank) => {
    // The better, the stronger: the best tenth in the method's colour.
    const share = (rank + 1) / order.length, top = share > 0.9;
    pen.globalAlpha = top ? 0.95 : Math.max(0.06, Math.min(0.45, 120 / order.length)) * (0.4 + 0.6 * share);
    pen.strokeStyle = top ? methodColour(study.methods[trial.method]) : weak;
    pen.lineWidth = top ? 1.8 : 1.1;
    trace(line);
  });
  const over = s('svg', {class: 'over', width, height, 'aria-hidden': 'true'}), tip = h('div', {class: 'tip', hidden: true});
  const mark = (trial, kind) => over.append(s('path', {class: `curve ${kind}`, d: `M${lineOf(trial).map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join('L')}`}));
  const redraw = near => {
    over.replaceChildren();
    const fixed = actions.fixed();
    if (fixed && shown.includes(fixed)) mark(fixed, 'fixed');
    if (near) mark(near, 'near');
  };
  const under = event => {
    const box = host.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
    let best = null, least = 14;
    for (const [trial, line] of lines) {
      for (let index = 1; index < line.length; index++) {
        const [[x1, y1], [x2, y2]] = [line[index - 1], line[index]];
        if (px < x1 || px > x2) continue;
        const distance = Math.abs(y1 + (px - x1) / (x2 - x1) * (y2 - y1) - py);
        if (distance < least) { least = distance; best = trial; }
      }
    }
    return best;
  };
  host.onpointermove = event => {
    const trial = under(event), box = host.getBoundingClientRect();
    redraw(trial);
    tip.hidden = !trial;
    if (!trial) return;
    tip.replaceChildren(h('b', {}, `Trial ${trial.number}, ${study.methods[trial.method].name}: ${domain.title} ${metricText(trial.value)}`), h('span', {}, settingsText(trial)));
    const size = tip.getBoundingClientRect(), x = event.clientX - box.left;
    tip.style.left = `${Math.max(0, Math.min(x > width / 2 ? x - size.width - 14 : x + 14, width - size.width))}px`;
    tip.style.top = `${Math.max(0, event.clientY - box.top - size.height - 10)}px`;
  };
  host.onpointerleave = () => { tip.hidden = true; redraw(null); };
  host.onclick = event => { const trial = under(event); if (trial) actions.fix(trial); };
  svg.setAttribute('class', 'over');
  const base = s('svg', {width, height, 'aria-hidden': 'true'});
  host.replaceChildren(base, canvas, svg, over, tip);
  redraw(null);
}
