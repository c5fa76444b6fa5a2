// One domain's front: metric against what the reader chose. What is faint and may be ten thousand trials is drawn on a
// canvas; what is few and matters is SVG above it.

// Ends of the metric's axis: all that finished, and of what is far worse only some, so that the front is not squeezed.
function metricRange(shown, values) {
  const {domain} = shown, {log, better} = domain, to = log ? Math.log10 : value => value;
  const usable = log ? values.filter(value => value > 0) : values;
  const done = shown.placed.filter(trial => finished(trial) && (!log || trial.value > 0)).map(trial => trial.value);
  if (done.length < 2) return reach(usable, log);
  const worse = (a, b) => better * (a - b) < 0 ? a : b, nicer = (a, b) => better * (a - b) < 0 ? b : a;
  const best = usable.reduce(nicer), worst = usable.reduce(worse);
  done.sort((a, b) => better * (b - a));
  const core = [done[Math.floor(0.9 * (done.length - 1))], ...shown.front.map(trial => trial.value)].reduce(worse);
  const room = 0.4 * Math.max(Math.abs(to(done[0]) - to(core)), 0.15 * Math.abs(to(best) - to(worst)));
  const end = log ? 10 ** (to(core) - better * room) : core - better * room;
  return reach([best, nicer(worst, end)], log);
}

function place(shown, width, height, small) {
  const {domain, axis, placed} = shown;
  const margin = small ? {left: 46, right: 10, top: 22, bottom: 40} : {left: 52, right: 16, top: 24, bottom: 42};
  const xs = placed.map(trial => xOf(trial, axis)), logX = AXES[axis].log || farApart(xs);
  const values = placed.map(trial => trial.value);
  for (const trial of placed) {
    if (trial.confirmed) values.push(trial.confirmed.mean - trial.confirmed.std, trial.confirmed.mean + trial.confirmed.std);
  }
  if (placed.length) values.push(...domain.baselines.map(baseline => baseline.value));
  const [left, right] = reach(xs, logX), [low, high] = metricRange(shown, values);
  const y = scale(domain.log, low, high, height - margin.bottom, margin.top);
  return {
    margin, width, height, y,
    x: scale(logX, left, right, margin.left, width - margin.right),
    // What is beyond the picture stands at its edge.
    yOf: value => y.at(Math.max(low, Math.min(high, value))),
  };
}

// Where along its line a name hides least of the front, the error bars and the trials.
function placeOfName(shown, frame, text, length) {
  const {margin, width, x} = frame, first = margin.left + 5, room = width - margin.right - 5 - length - first, stops = room > 0 ? 12 : 0;
  const things = [], add = (left, right, top, bottom, weight) => {
    if (bottom > text - 12 && top < text + 4) things.push([left, right, weight]);
  };
  for (const trial of shown.placed) {
    const px = x.at(xOf(trial, shown.axis)), py = frame.yOf(trial.value), bold = shown.bold.has(trial);
    add(px - 5, px + 5, py - 5, py + 5, bold ? 4 : 1);
    if (trial.confirmed) {
      const {mean, std} = trial.confirmed, ends = [frame.yOf(mean - std), frame.yOf(mean + std)];
      add(px - 5, px + 5, Math.min(...ends), Math.max(...ends), 4);
    }
  }
  pointsOf(shown, frame).forEach(([px, py], index, all) => {
    const next = all[index + 1] ?? [width - margin.right, py];
    add(px, next[0], py, py, 2);
    add(next[0], next[0], Math.min(py, next[1]), Math.max(py, next[1]), 2);
  });
  let best = {at: first, hidden: Infinity};
  for (let stop = 0; stop <= stops; stop++) {
    const at = first + room * stop / Math.max(1, stops);
    const hidden = things.reduce((sum, [left, right, weight]) => right > at && left < at + length ? sum + weight : sum, 0);
    if (hidden < best.hidden) best = {at, hidden};
  }
  return best;
}

function drawBaselines(svg, shown, frame, small) {
  const {margin, width, y} = frame, lines = [...shown.domain.baselines], taken = [];
  if (!shown.placed.length) return;
  for (const baseline of lines.sort((a, b) => b.value - a.value)) {
    const below = baseline.value < y.low, above = baseline.value > y.high, at = frame.yOf(baseline.value);
    const title = `${below ? '↓ ' : above ? '↑ ' : ''}${clip(baseline.title, Math.floor(width / (width < 420 ? 16 : 10)))} ${metricText(baseline.value)}`;
    let text = at - 5;
    // Of two close lines the lower one's name stands below it; of three, further below.
    while (taken.some(other => Math.abs(other - text) < 13)) text += text < at ? 19 : 13;
    let name = small ? null : placeOfName(shown, frame, text, title.length * 6.4);
    const under = at + 14, free = !below && under < frame.height - margin.bottom - 2 && !taken.some(other => Math.abs(other - under) < 13);
    if (name && text < at && free) {
      const lower = placeOfName(shown, frame, under, title.length * 6.4);
      if (lower.hidden < name.hidden) { name = lower; text = under; }
    }
    taken.push(text);
    if (!below && !above) svg.append(s('line', {class: 'base', x1: margin.left, x2: width - margin.right, y1: at, y2: at}));
    if (name) svg.append(s('text', {class: 'halo', x: name.at.toFixed(1), y: text}, title));
  }
}

function paintFaint(canvas, shown, frame, study) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = frame.width * ratio; canvas.height = frame.height * ratio;
  canvas.style.width = `${frame.width}px`; canvas.style.height = `${frame.height}px`;
  const pen = canvas.getContext('2d'), colours = study.methods.map(methodColour), paths = SYMBOLS.map(path => new Path2D(path));
  const grey = ink('edge');
  pen.scale(ratio, ratio);
  const many = shown.placed.length > 2000, size = many ? 2.6 : 3.9;
  const at = trial => [frame.x.at(xOf(trial, shown.axis)), frame.yOf(trial.value)];
  // On dark paper what is faint is lost sooner.
  const strength = isDark() ? 1.4 : 1;
  pen.globalAlpha = strength * (many ? 0.3 : 0.55); pen.strokeStyle = grey; pen.lineWidth = 1.1;
  pen.beginPath();
  for (const trial of shown.placed) {
    if (trial.state !== 'PRUNED') continue;
    const [x, y] = at(trial), arm = many ? 2 : 3;
    pen.moveTo(x - arm, y - arm); pen.lineTo(x + arm, y + arm); pen.moveTo(x - arm, y + arm); pen.lineTo(x + arm, y - arm);
  }
  pen.stroke();
  pen.globalAlpha = strength * (many ? 0.3 : 0.42);
  for (const trial of shown.placed) {
    if (trial.state !== 'COMPLETE' || shown.bold.has(trial)) continue;
    const [x, y] = at(trial);
    pen.setTransform(ratio * size, 0, 0, ratio * size, ratio * x, ratio * y);
    pen.fillStyle = colours[trial.method];
    pen.fill(paths[study.methods[trial.method].symbol]);
  }
}

const pointsOf = (shown, frame) => shown.front.map(trial => [frame.x.at(xOf(trial, shown.axis)), frame.yOf(trial.value), trial]);

// At each cost the best metric that so much can buy.
function paintLine(svg, shown, frame) {
  const points = pointsOf(shown, frame), {margin} = frame;
  if (!points.length) return;
  let path = `M${points[0][0].toFixed(1)},${points[0][1].toFixed(1)}`;
  for (const [px, py] of points.slice(1)) path += `H${px.toFixed(1)}V${py.toFixed(1)}`;
  path += `H${frame.width - margin.right}`;
  svg.append(s('path', {class: 'area', d: `${path}V${frame.height - margin.bottom}H${points[0][0].toFixed(1)}Z`}),
    s('path', {class: 'step', d: path}));
}

function paintBold(svg, shown, frame, study, small) {
  const {x} = frame;
  for (const trial of shown.placed.filter(trial => trial.confirmed)) {
    const {mean, std} = trial.confirmed, px = x.at(xOf(trial, shown.axis)).toFixed(1);
    const [top, middle, bottom] = [mean + std, mean, mean - std].map(value => frame.yOf(value).toFixed(1));
    svg.append(s('path', {class: 'error', 'data-error': trial.number,
      d: `M${px},${top}V${bottom}M${px - 4},${top}h8M${px - 4},${bottom}h8M${px - 6},${middle}h12`}));
  }
  for (const [px, py, trial] of pointsOf(shown, frame)) {
    svg.append(symbol(study.methods[trial.method], px, py, small ? 4.6 : 6, {class: 'mark', 'data-trial': trial.number}));
    if (shown.axis !== 'trainable_parameters' && shown.domain.onFront.has(trial.number)) {
      svg.append(s('circle', {class: 'study', cx: px, cy: py, r: 10}));
    }
  }
  for (const trial of shown.placed.filter(trial => trial.state === 'RUNNING')) {
    svg.append(s('circle', {class: 'now', cx: x.at(xOf(trial, shown.axis)), cy: frame.yOf(trial.value), r: 5}));
  }
}

// Draws the domain's plot into an element; returns where everything is.
function drawFront(host, shown, study, {small = false, room = 0} = {}) {
  const width = Math.max(260, host.clientWidth);
  const height = small ? 210 : Math.round(Math.max(Math.min(Math.max(width * 0.6, 330), 500), Math.min(room, width * 1.1)));
  const frame = place(shown, width, height, small), axis = AXES[shown.axis];
  const back = s('svg', {width, height, 'aria-hidden': 'true'}), canvas = h('canvas', {'aria-hidden': 'true'});
  const over = s('svg', {class: 'over', width, height, 'aria-hidden': 'true'});
  back.append(axes(width, height, frame.x, frame.y, frame.margin,
    {x: axis.title, y: shown.domain.title, xTick: axis.tick, yTick: shortNumber}));
  paintLine(over, shown, frame);
  drawBaselines(over, shown, frame, small);
  paintBold(over, shown, frame, study, small);
  if (!shown.placed.length) {
    back.append(s('text', {x: width / 2, y: height / 2, 'text-anchor': 'middle'},
      shown.trials.length ? 'no trial to show here yet' : 'no trial is left by the filters'));
  }
  host.replaceChildren(back, canvas, over);
  paintFaint(canvas, shown, frame, study);
  return {...frame, over};
}

function nearest(shown, frame, px, py) {
  let best = null, least = 26 ** 2;
  for (const trial of shown.placed) {
    const dx = frame.x.at(xOf(trial, shown.axis)) - px, dy = frame.yOf(trial.value) - py;
    // A trial on the front wins over a faint one that is a little nearer.
    const distance = (dx * dx + dy * dy) * (shown.bold.has(trial) ? 0.5 : 1);
    if (distance < least) { least = distance; best = trial; }
  }
  return best;
}

function tipOf(trial, shown, study) {
  const axis = AXES[shown.axis], lines = [`${shown.domain.title} ${metricText(trial.value)}`];
  if (trial.confirmed) {
    lines.push(`confirmed ${metricText(trial.confirmed.mean)} ± ${metricText(trial.confirmed.std)} (${trial.confirmed.seeds} seeds)`);
  }
  lines.push(`${whole(trial.trainable_parameters)} trainable parameters`);
  if (shown.axis !== 'trainable_parameters') lines.push(`${axis.title}: ${axis.text(trial[shown.axis])}`);
  if (study.models.length > 1) lines.push(clip(study.models[trial.model].name, 80));
  lines.push(...trial.short.map(([name, value]) => clip(settingText(name, value), 80)));
  return lines;
}

// The big plot: hovering, clicking, the keyboard.
function frontPlot(host, shown, study, actions, room) {
  const frame = drawFront(host, shown, study, {room}), tip = h('div', {class: 'tip', hidden: true});
  const rings = s('g', {});
  frame.over.append(rings);
  host.append(tip);
  let near = null;
  const spot = trial => [frame.x.at(xOf(trial, shown.axis)), frame.yOf(trial.value)];
  const ring = () => {
    rings.replaceChildren();
    const fixed = actions.fixed();
    if (fixed && shown.placed.includes(fixed)) {
      const [x, y] = spot(fixed);
      rings.append(s('line', {class: 'pin', x1: x, x2: x, y1: y + 11, y2: frame.height - frame.margin.bottom}),
        s('circle', {class: 'fixed', cx: x, cy: y, r: 10, 'data-fixed': fixed.number}));
    }
    if (near) rings.append(s('circle', {class: 'near', cx: spot(near)[0], cy: spot(near)[1], r: 9}));
  };
  const point = trial => {
    if (trial === near) return;
    near = trial;
    tip.hidden = !trial;
    ring();
    if (!trial) return;
    const [x, y] = spot(trial);
    tip.replaceChildren(h('b', {}, `Trial ${trial.number}: ${study.methods[trial.method].name}` +
      (trial.state === 'COMPLETE' ? '' : ` (${trial.state.toLowerCase()})`)), ...tipOf(trial, shown, study).map(line => h('span', {}, line)));
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(0, Math.min(x > frame.width / 2 ? x - box.width - 14 : x + 14, frame.width - box.width))}px`;
    tip.style.top = `${Math.max(0, Math.min(y - box.height / 2, frame.height - box.height))}px`;
  };
  const under = event => {
    const box = host.getBoundingClientRect();
    return nearest(shown, frame, event.clientX - box.left, event.clientY - box.top);
  };
  host.onpointermove = event => point(under(event));
  host.onpointerleave = () => point(null);
  host.onclick = event => { const trial = under(event); if (trial) actions.fix(trial); };
  host.onblur = () => point(null);
  host.onkeydown = event => {
    const front = event.key === 'ArrowLeft' || event.key === 'ArrowRight';
    const order = front ? shown.front : [...shown.placed].sort((a, b) => a[shown.axis] - b[shown.axis] || a.number - b.number);
    const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: 1, ArrowDown: -1}[event.key];
    const from = near ?? actions.fixed();
    if (step && order.length) {
      let index = order.indexOf(from);
      if (index < 0) {
        const after = from ? order.findIndex(trial => trial[shown.axis] > from[shown.axis]) : 0;
        index = (after < 0 ? order.length : after) - (step > 0 ? 1 : 0);
      }
      point(order[Math.max(0, Math.min(order.length - 1, index + step))]);
    } else if (event.key === 'Home' && shown.front.length) point(shown.front[0]);
    else if (event.key === 'End' && shown.front.length) point(shown.front.at(-1));
    else if ((event.key === 'Enter' || event.key === ' ') && near) actions.fix(near);
    else if (event.key === 'Escape') point(null);
    else return;
    event.preventDefault();
    if (near) say(`Trial ${near.number}, ${study.methods[near.method].name}, ${near.state.toLowerCase()}: ${tipOf(near, shown, study).join(', ')}`);
  };
  ring();
}
