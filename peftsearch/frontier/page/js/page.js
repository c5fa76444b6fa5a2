// The page: what the reader has chosen, and everything drawn anew from it. Newly arrived data changes nothing of it.

const live = JSON.parse(document.getElementById('live').textContent);
let study = decode(JSON.parse(document.getElementById('data').textContent));
let lost = false, lastTag = null;

const view = {
  domain: study.domains.length > 1 ? -1 : 0,
  axis: 'trainable_parameters',
  withoutMethods: new Set(),
  model: null,
  budget: null,
  dominated: true,
  pruned: true,
  fixed: new Map(),
  scope: 'front',
  order: {key: 'parameters', descending: false},
  rows: 25,
  method: null,
  over: 'trials',
  open: new Set(),
};

const domainNow = () => study.domains[view.domain];

function fixedTrial() {
  const domain = domainNow();
  if (!domain) return null;
  const number = view.fixed.has(domain.name) ? view.fixed.get(domain.name) : domain.picks.knee;
  return number === null ? null : study.byNumber.get(number) ?? null;
}

const ALL = -1;  // Instead of one method's index.

const actions = {
  fixed: fixedTrial,
  fix(trial) {
    view.fixed.set(domainNow().name, trial ? trial.number : null);
    say(trial ? `Trial ${trial.number} is fixed` : 'No trial is fixed');
    remember();
    render();
  },
  open(index, trial) {
    view.domain = index;
    if (trial) view.fixed.set(study.domains[index].name, trial.number);
    const name = index < 0 ? 'All domains' : study.domains[index].name;
    say(trial ? `${name}, trial ${trial.number} is fixed` : `${name} is shown`);
    remember();
    render();
  },
};

// --- the address: a link to a page is a link to what is seen on it ---

function remember() {
  const domain = domainNow(), trial = domain && view.fixed.get(domain.name);
  const hash = domain ? `#${encodeURIComponent(domain.name)}${typeof trial === 'number' ? `/${trial}` : ''}` : '#';
  try {
    history.replaceState(null, '', hash);
  } catch {
    // A page inside a frame of another one has no address of its own.
  }
}

function recall() {
  const [name, number] = location.hash.slice(1).split('/');
  let wanted = '';
  try {
    wanted = decodeURIComponent(name);
  } catch {
    return;
  }
  const index = study.domains.findIndex(domain => domain.name === wanted);
  if (index < 0) return;
  view.domain = index;
  const trial = study.byNumber.get(Number(number));
  if (number && trial?.domain === index) view.fixed.set(wanted, trial.number);
}

// --- head ---

function countsText(counts) {
  const text = ['complete', 'pruned', 'failed', 'running'].filter(state => counts[state]).map(state => `${whole(counts[state])} ${state}`);
  return text.join(', ') || 'no trials';
}

function head() {
  const counts = {};
  for (const domain of study.domains) for (const [state, count] of Object.entries(domain.counts)) counts[state] = (counts[state] ?? 0) + count;
  const ended = (counts.complete ?? 0) + (counts.pruned ?? 0) + (counts.failed ?? 0);
  const models = study.models.map(model => model.name + (model.parameters ? ` (${si(model.parameters)} parameters)` : '')).join(', ');
  const planned = study.planned && study.planned > ended ? ` of ${whole(study.planned)} planned` : '';
  document.getElementById('head').replaceChildren(
    h('div', {class: 'top'}, h('h1', {class: 'name'}, study.study),
      study.state ? h('span', {class: `chip ${study.state}`, id: 'state'}, study.state) : null,
      lost ? h('span', {class: 'chip lost', role: 'status'}, 'no answer, trying again') : null,
      h('div', {class: 'links'},
        live ? h('a', {href: live.studies}, 'All studies') : null,
        live?.mlflow ? h('a', {href: live.trials ?? `${live.mlflow}#/experiments?workflowType=machine_learning&searchFilter=${encodeURIComponent(study.study)}`}, 'MLflow') : null,
        h('button', {type: 'button', class: 'quiet', 'data-focus': 'theme', 'aria-pressed': String(isDark()), onclick: () => {
          forced = isDark() ? 'light' : 'dark';
          document.documentElement.style.colorScheme = forced;
          render();
        }}, 'Dark'))),
    study.description ? h('p', {class: 'lead name'}, study.description) : '',
    h('p', {class: 'soft small name'}, `${models} · ${countsText(counts)}${planned}`));
}

function tabs() {
  if (study.domains.length < 2) return null;
  const names = ['All domains', ...study.domains.map(domain => domain.name)];
  return h('div', {class: 'tabs', role: 'tablist', 'aria-label': 'Domains'}, names.map((name, place) => {
    const index = place - 1, chosenNow = view.domain === index;
    return h('button', {type: 'button', role: 'tab', class: 'name', 'aria-selected': String(chosenNow), 'aria-controls': 'panel',
      tabindex: chosenNow ? 0 : -1, 'data-focus': `tab-${index}`, onclick: () => actions.open(index),
      onkeydown: event => {
        const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
        if (!step) return;
        event.preventDefault();
        actions.open((place + step + names.length) % names.length - 1);
        document.querySelector('[role=tab][aria-selected=true]').focus();
      }}, name);
  }));
}

// --- one domain ---

function picks(domain) {
  const fixed = fixedTrial();
  return h('div', {class: 'picks', role: 'group', 'aria-label': 'Which configuration to use'},
    [...new Set(Object.values(domain.picks))].map(number => {
      const trial = study.byNumber.get(number), method = study.methods[trial.method];
      const hows = Object.keys(domain.picks).filter(how => domain.picks[how] === number), title = hows.join(', ');
      const tie = hows.map(how => domain.ties[how]).find(Boolean);
      return h('button', {type: 'button', class: 'pick', 'data-focus': `pick-${hows[0]}`, 'data-pick': hows.join(' '),
        'aria-pressed': String(fixed === trial), onclick: () => actions.fix(trial)},
      h('span', {class: 'how'}, h('b', {}, title[0].toUpperCase() + title.slice(1)), tie ? ': the cheapest that is no worse within the error bars' : hows.length === 1 ? `: ${PICKS[hows[0]](domain.title)}` : null),
      h('span', {class: 'big'}, metricText(trial.value), ' ', trial.confirmed
        ? h('small', {}, `${deviation(trial.confirmed.mean, trial.confirmed.std)} over ${trial.confirmed.seeds} seeds`) : null),
      h('span', {class: 'what'}, glyph(method), `${method.name}, ${whole(trial.trainable_parameters)} parameters`),
      tie ? h('span', {class: 'what'}, tie) : null);
    }));
}

// What a further point of the metric costs: between the picks in words, along the whole front in a table.
function costs(domain) {
  if (!domain.steps.length) return null;
  const [{point}] = domain.steps, of = key => step => study.byNumber.get(step[key]);
  const from = of('from'), to = of('to'), named = trial => [glyph(study.methods[trial.method]), ` ${trial.number} ${study.methods[trial.method].name}`];
  const signed = value => `${value < 0 ? '−' : '+'}${metricText(Math.abs(value))}`;
  const label = `What each step along the front of ${domain.name} costs`;
  return h('section', {class: 'card costs', id: 'costs', 'aria-label': 'What a further point costs'},
    h('h3', {}, 'What a further point costs'), h('ul', {}, domain.costs.map(text => h('li', {}, text))),
    folded('Along the whole front', plainTable(label, [
      {title: 'to', left: true, cell: step => named(to(step))},
      {title: 'from', left: true, cell: step => named(from(step))},
      {title: domain.title, cell: step => signed(to(step).value - from(step).value)},
      {title: 'more parameters', cell: step => whole(to(step).trainable_parameters - from(step).trainable_parameters)},
      {title: `for each ${point}`, cell: step => whole(step.each * point / step.point)},
      domain.steps.some(step => step.seeds) && {title: 'over seeds', cell: step => step.seeds
        ? `${signed(domain.better * step.seeds[0])} ± ${metricText(step.seeds[1])}` : ''},
    ].filter(Boolean), domain.steps)));
}

function controls(domain, shown) {
  const toggle = (text, on, change, focus, mark) => h('button', {type: 'button', class: 'toggle', 'aria-pressed': String(on),
    'data-focus': focus, onclick: () => { change(); render(); }}, mark, text);
  const present = study.methods.map((method, index) => index).filter(index => domain.trials.some(trial => trial.method === index));
  const sizes = domain.trials.map(trial => Math.max(1, trial.trainable_parameters)).sort((a, b) => a - b);
  const [least, most] = [sizes[0] ?? 1, sizes.at(-1) ?? 1], stops = 200;
  const limitAt = stop => stop >= stops ? null : Math.ceil(least * (most / least) ** (stop / stops));
  // Where all have one size, a budget of another domain leaves all of them or none.
  const stopNow = view.budget === null ? stops : most === least ? (view.budget < least ? 0 : stops)
    : Math.round(Math.max(0, Math.min(1, Math.log(view.budget / least) / Math.log(most / least))) * stops);
  const limitText = limit => limit === null ? 'no limit' : `at most ${whole(limit)}`;
  const output = h('output', {for: 'budget'}, limitText(view.budget));
  return h('div', {class: 'controls'},
    h('fieldset', {}, h('legend', {}, 'Methods'), h('div', {class: 'row'}, present.map(index => toggle(study.methods[index].name,
      !view.withoutMethods.has(index), () => {
        if (!view.withoutMethods.delete(index)) view.withoutMethods.add(index);
      }, `method-${index}`, glyph(study.methods[index]))))),
    most > least || view.budget !== null ? h('div', {class: 'field budget'}, h('label', {for: 'budget'}, 'Budget of trainable parameters'),
      h('input', {type: 'range', id: 'budget', min: 0, max: stops, value: stopNow, 'data-focus': 'budget',
        'aria-valuetext': limitText(view.budget),
        oninput: event => {
          view.budget = limitAt(Number(event.target.value));
          output.textContent = limitText(view.budget);
          event.target.setAttribute('aria-valuetext', limitText(view.budget));
          draw();
        }, onchange: () => render()}), output) : null,
    h('div', {class: 'field'}, h('label', {for: 'axis'}, 'Against'), h('select', {id: 'axis', 'data-focus': 'axis',
      onchange: event => { view.axis = event.target.value; render(); }},
    domain.axes.map(key => h('option', {value: key, selected: key === shown.axis}, AXES[key].title)))),
    study.models.length > 1 ? h('div', {class: 'field'}, h('label', {for: 'model'}, 'Model'), h('select', {id: 'model', 'data-focus': 'model',
      onchange: event => { view.model = event.target.value === '' ? null : Number(event.target.value); render(); }},
    h('option', {value: '', selected: view.model === null}, 'all'),
    study.models.map((model, index) => h('option', {value: index, selected: view.model === index}, model.name)))) : null,
    h('fieldset', {}, h('legend', {}, 'Beside the front'), h('div', {class: 'row'},
      toggle('dominated', view.dominated, () => { view.dominated = !view.dominated; }, 'dominated'),
      toggle('pruned', view.pruned, () => { view.pruned = !view.pruned; }, 'pruned'))));
}

function sentence(shown) {
  const {domain, front, axis} = shown, ofStudy = front.filter(trial => domain.onFront.has(trial.number)).length;
  const more = domain.better > 0 ? 'better' : 'lower';
  if (!front.length) return '';
  const text = `${front.length} trial${front.length === 1 ? '' : 's'} on this front: no other shown here has a ${more} ${domain.title} without more ${
    {trainable_parameters: 'trainable parameters', exported_parameters: 'exported parameters', train_seconds: 'training time',
      peak_memory_bytes: 'memory', batch_milliseconds: 'time per example, in batches'}[axis]}.`;
  return axis === 'trainable_parameters' && ofStudy === domain.front.length && front.length === ofStudy ? text
    : `${text} Of the ${domain.front.length} on the domain’s front by trainable parameters, ${ofStudy} ${ofStudy === 1 ? 'is' : 'are'} among them.`;
}

function keyOf(shown) {
  const mark = (...parts) => s('svg', {width: 14, height: 10, viewBox: '-7 -5 14 10', 'aria-hidden': 'true'}, parts);
  const grey = 'currentColor', stroke = {stroke: grey, 'stroke-width': 1.2, fill: 'none'};
  const items = [
    [mark(s('circle', {r: 4, fill: grey})), 'on the front'],
    shown.placed.some(trial => trial.state === 'COMPLETE' && !shown.bold.has(trial)) && [mark(s('circle', {r: 3, fill: grey, opacity: 0.4})), 'dominated'],
    shown.placed.some(trial => trial.state === 'PRUNED') && [mark(s('path', {d: 'M-3,-3L3,3M-3,3L3,-3', opacity: 0.7, ...stroke})), 'pruned, at its last evaluation; far worse ones at the edge'],
    shown.placed.some(trial => trial.state === 'RUNNING') && [mark(s('circle', {r: 3.6, ...stroke})), 'running'],
    shown.placed.some(trial => trial.confirmed) && [mark(s('path', {d: 'M0,-4V4M-3,-4h6M-3,4h6M-4,0h8', ...stroke})), 'mean ± std over seeds'],
    shown.domain.baselines.length && [mark(s('path', {d: 'M-7,0H7', 'stroke-dasharray': '1.5 3', ...stroke})), 'baseline, without tuning'],
  ];
  return h('p', {class: 'key'}, items.filter(Boolean).map(([picture, text]) => h('span', {}, picture, text)));
}

function columnsOf(domain, shown, choose = actions.fix) {
  const axis = AXES[shown.axis], keys = shown.axis !== 'trainable_parameters';
  const several = study.models.length > 1, confirmed = domain.trials.some(trial => trial.confirmed);
  const tested = domain.trials.some(trial => trial.confirmed && trial.confirmed.testMean !== null);
  return [
    {key: 'number', title: 'trial', value: trial => trial.number, cell: trial => h('button', {type: 'button', class: 'go',
      'data-focus': `trial-${trial.number}`, 'aria-label': `Fix trial ${trial.number}`, onclick: event => { event.stopPropagation(); choose(trial); }}, String(trial.number))},
    {key: 'method', title: 'method', left: true, value: trial => study.methods[trial.method].name,
      cell: trial => [glyph(study.methods[trial.method]), ' ', study.methods[trial.method].name]},
    several && {key: 'model', title: 'model', left: true, value: trial => study.models[trial.model].name, cell: trial => study.models[trial.model].name},
    {key: 'value', title: domain.title, big: domain.better > 0, value: trial => trial.value,
      cell: trial => trial.value === null ? '' : finished(trial) ? h('b', {}, metricText(trial.value)) : metricText(trial.value)},
    confirmed && {key: 'mean', title: 'over seeds', big: domain.better > 0, value: trial => trial.confirmed?.mean,
      cell: trial => trial.confirmed ? `${deviation(trial.confirmed.mean, trial.confirmed.std)} (${trial.confirmed.seeds})` : ''},
    tested && {key: 'test', title: 'test', big: domain.better > 0, value: trial => trial.confirmed?.testMean,
      cell: trial => trial.confirmed && trial.confirmed.testMean !== null ? deviation(trial.confirmed.testMean, trial.confirmed.testStd ?? 0) : ''},
    {key: 'parameters', title: 'trainable parameters', value: trial => trial.trainable_parameters, cell: trial => whole(trial.trainable_parameters)},
    keys && {key: 'axis', title: axis.title, value: trial => trial[shown.axis], cell: trial => trial[shown.axis] === null ? '' : axis.text(trial[shown.axis])},
    shown.axis !== 'train_seconds' && {key: 'time', title: 'training time', value: trial => trial.train_seconds,
      cell: trial => trial.train_seconds === null ? '' : timeText(trial.train_seconds)},
    {key: 'state', title: 'state', left: true, value: trial => domain.onFront.has(trial.number) ? ' front' : trial.state.toLowerCase(),
      cell: trial => domain.onFront.has(trial.number) ? h('span', {class: 'dot'}, 'on the front') : trial.state.toLowerCase()},
    {key: 'settings', title: 'hyperparameters', left: true, wrap: true, value: settingsText, cell: trial => trial.error
      ? h('span', {class: 'error-text'}, clip(trial.error, 160)) : trial.short.map(([name, value]) => [h('span', {}, clip(settingText(name, value), 60)), ' '])},
  ].filter(Boolean);
}

const SCOPES = {
  front: ['Front', (trial, shown) => shown.bold.has(trial)],
  finished: ['Finished', trial => trial.state === 'COMPLETE'],
  all: ['All', () => true],
};

function trialTable(domain, shown) {
  const columns = columnsOf(domain, shown), order = columns.some(column => column.key === view.order.key) ? view.order : {key: 'parameters', descending: false};
  const scope = shown.front.length || view.scope !== 'front' ? view.scope : 'all';
  const rows = sorted(shown.trials.filter(trial => SCOPES[scope][1](trial, shown)), columns.find(column => column.key === order.key), order.descending);
  const fixed = fixedTrial(), left = rows.length - view.rows;
  return [
    h('div', {class: 'table-head'}, h('h3', {}, `Trials of ${domain.name}`, h('span', {class: 'soft small'}, ` ${whole(rows.length)} shown, of ${whole(domain.trials.length)}`)),
      h('div', {class: 'switch', role: 'group', 'aria-label': 'Which trials'}, Object.entries(SCOPES).map(([key, [text]]) =>
        h('button', {type: 'button', 'aria-pressed': String(scope === key), 'data-focus': `scope-${key}`, onclick: () => { view.scope = key; view.rows = 25; draw(); }}, text)))),
    h('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': `Trials of ${domain.name}`, 'data-scroll': 'trials'},
      h('table', {id: 'trials', 'aria-label': `Trials of ${domain.name}`}, sortHead(columns, order, wanted => { view.order = wanted; draw(); }),
        h('tbody', {}, rows.slice(0, view.rows).map(trial => h('tr', {
          class: `pickable${trial.state === 'COMPLETE' ? '' : ' off'}`, 'data-number': trial.number, 'aria-current': trial === fixed ? 'true' : null,
          onclick: () => actions.fix(trial)},
        columns.map(column => h('td', {class: [column.left && 'l', column.wrap && 'wrap'].filter(Boolean).join(' ') || null}, column.cell(trial)))))))),
    left > 0 ? h('div', {class: 'more'}, h('button', {type: 'button', class: 'quiet', 'data-focus': 'more', onclick: () => { view.rows += 100; draw(); }},
      `Show ${whole(Math.min(100, left))} more`), h('span', {class: 'small soft'}, `${whole(left)} further trials`)) : null,
  ];
}

function runningTable(domain) {
  const running = domain.trials.filter(trial => trial.state === 'RUNNING');
  if (!running.length) return null;
  const label = `Running trials of ${domain.name}`;
  return h('div', {class: 'card'}, h('div', {class: 'table-head'}, h('h3', {}, study.state === 'interrupted' ? 'Interrupted: these go on when the study is continued' : 'Running now')), plainTable(label, [
    {title: 'trial', cell: trial => String(trial.number)},
    {title: 'method', left: true, cell: trial => [glyph(study.methods[trial.method]), ' ', study.methods[trial.method].name]},
    {title: 'steps', cell: trial => trial.steps ? `${whole(trial.rungs.at(-1)?.step ?? 0)} of ${whole(trial.steps)}` : ''},
    {title: `${domain.title} so far`, cell: trial => trial.value === null ? 'not evaluated yet' : metricText(trial.value)},
    {title: 'hyperparameters', left: true, cell: settingsText},
  ], running));
}

function notice(domain) {
  if (domain.front.length) return null;
  const {running, pruned, failed} = domain.counts;
  const rest = [running && `${whole(running)} ${running === 1 ? 'runs' : 'run'} now`, pruned && `${whole(pruned)} ${pruned === 1 ? 'was' : 'were'} pruned`,
    failed && `${whole(failed)} failed`].filter(Boolean);
  return h('p', {class: 'notice', role: 'status'}, `No trial of ${domain.name} has reached the full budget yet, so there is no front. `,
    rest.length ? `Of its trials, ${rest.join(', ')}.` : 'None has begun.');
}

function foundations(domain) {
  const rows = Object.entries(domain.rows).map(([split, count]) => `${whole(count)} ${split}`).join(', ');
  return h('section', {class: 'card facts'}, h('h3', {}, 'What this rests on'),
    h('p', {}, `Task ${domain.task}, metric ${domain.title} (${domain.better > 0 ? 'more' : 'less'} is better) on the validation split. Texts: ${rows}.`),
    h('p', {class: 'soft name'}, `Data: ${domain.source}`),
    domain.warnings.length ? h('ul', {}, domain.warnings.map(text => h('li', {class: 'name'}, text))) : null);
}

// --- drawing ---

// The parts that follow the filters are filled by draw(), so that a slider stays under the reader's hand.
function panel(domain) {
  return h('div', {class: 'stack', id: 'panel', role: study.domains.length > 1 ? 'tabpanel' : null, 'aria-label': domain.name},
    h('div', {class: 'stack'}, h('h2', {}, h('bdi', {}, domain.name), h('span', {class: 'soft'}, ` ${domain.title} against cost`)),
      domain.front.length ? h('p', {class: `verdict ${domain.verdict.paid === true ? 'paid' : domain.verdict.paid === false ? 'unpaid' : ''}`}, domain.verdict.sentence) : notice(domain)),
    domain.front.length ? picks(domain) : null,
    costs(domain),
    domain.trials.length ? plots(domain) : null,
    foundations(domain));
}

function plots(domain) {
  const shown = chosen(domain, view), held = id => h('div', {id});
  return [
    h('section', {class: 'card', 'aria-label': `Front of ${domain.name}`}, controls(domain, shown),
      h('div', {class: 'pair'}, h('div', {class: 'plotted'},
        h('div', {class: 'plot big', id: 'front', tabindex: 0, role: 'application', 'data-focus': 'front', 'aria-roledescription': 'plot'}),
        held('below')), h('aside', {id: 'fixed', 'aria-label': 'The fixed trial'}))),
    runningTable(domain),
    h('section', {class: 'card', id: 'table', 'aria-label': 'Trials'}),
    h('div', {class: 'two'},
      h('figure', {class: 'card figure'}, h('figcaption', {class: 'figure-head'}, h('h3', {}, 'Hypervolume over time'), held('history-head')), held('history'),
        h('p', {class: 'small soft'}, 'The share of the unit square that the front dominates (1 is best), as trials ended; time: what they took, one after another.'), held('history-table')),
      h('figure', {class: 'card figure', id: 'parallel-figure'}, h('figcaption', {class: 'figure-head', id: 'parallel-head'}), h('div', {class: 'plot', id: 'parallel'}),
        h('p', {class: 'small soft'}, 'One line per finished trial; coloured: the best tenth. The table of trials has the same numbers.'))),
  ];
}

const at = id => document.getElementById(id);

function drawHistory(domain) {
  const host = at('history');
  host.className = 'plot';
  const ended = domain.counts.complete + domain.counts.pruned + domain.counts.failed;
  if (!ended) {
    host.replaceChildren(h('p', {class: 'small soft'}, 'No trial has ended yet.'));
    at('history-table').replaceChildren();
    return;
  }
  if (saysNothing(domain)) {
    host.replaceChildren(h('p', {class: 'small soft'}, `It says nothing of a metric outside 0 to 1, such as this ${domain.title}.`));
    at('history-table').replaceChildren();
    return;
  }
  const total = domain.history.at(-1)[2], timed = total > 0, byTime = timed && view.over === 'time';
  const [unit, size] = total > 2 * 3600 ? ['hours', 3600] : total > 120 ? ['minutes', 60] : ['seconds', 1];
  at('history-head').replaceChildren(timed ? h('div', {class: 'switch', role: 'group', 'aria-label': 'Over what'}, ['trials', 'time'].map(over =>
    h('button', {type: 'button', 'aria-pressed': String(byTime === (over === 'time')), 'data-focus': `over-${over}`,
      onclick: () => { view.over = over; draw(); }}, over))) : '');
  lineChart(host, {label: `Hypervolume of ${domain.name} over ${ended} ended trials, which took ${timeText(total)}: ${domain.hypervolume.toFixed(4)} at the end`,
    x: byTime ? `${unit} of training` : 'ended trials', y: 'hypervolume', height: 250, floor: 0,
    series: [{points: domain.history.map(([count, value, seconds]) => [byTime ? seconds / size : count, value]), colour: ink('link'), step: true}]});
  const was = at('history-table').querySelector('details')?.open;
  at('history-table').replaceChildren(folded('As a table', plainTable(`Hypervolume of ${domain.name}`, [
    {title: 'ended trials', cell: ([count]) => whole(count)}, {title: 'took', cell: ([, , seconds]) => timeText(seconds)},
    {title: 'hypervolume', cell: ([, value]) => value.toFixed(4)}], domain.history)));
  at('history-table').querySelector('details').open = was ?? false;
}

function drawParallelFigure(domain, shown) {
  const count = index => domain.trials.filter(trial => trial.method === index && finished(trial)).length;
  const present = study.methods.map((method, index) => index).filter(index => count(index));
  const fixed = fixedTrial()?.method;
  // Until the reader has chosen: the fixed trial's method, where there is anything to compare; else all of them.
  const method = view.method === ALL || present.includes(view.method) ? view.method
    : present.length === 1 ? present[0] : count(fixed) > 1 ? fixed : ALL;
  const option = (index, text) => h('option', {value: index, selected: index === method}, text);
  at('parallel-head').replaceChildren(h('h3', {}, 'Hyperparameters'), present.length > 1 ? h('span', {class: 'row'}, h('label', {for: 'method'}, 'of'),
    h('select', {id: 'method', 'data-focus': 'method', onchange: event => { view.method = Number(event.target.value); draw(); }},
      option(ALL, 'all methods'), present.map(index => option(index, study.methods[index].name)))) : '');
  drawParallel(at('parallel'), shown.trials.filter(trial => method === ALL || trial.method === method), domain, study, actions);
}

let redraw = () => {};

function draw() {
  keeping(() => {
    const domain = domainNow();
    if (!domain) { redraw(); return; }
    if (!domain.trials.length) return;
    const shown = chosen(domain, view), trial = fixedTrial();
    at('front').setAttribute('aria-label', `${domain.title} against ${AXES[shown.axis].title}, ${shown.placed.length} trials, ${shown.front.length} on the front. ` +
      'Left and right go along the front, up and down through all trials, Enter fixes one. The table of trials below has the same.');
    at('below').className = 'stack';
    at('below').replaceChildren(keyOf(shown), h('p', {class: 'small soft', id: 'sentence'}, sentence(shown)));
    const held = trial ? trialPanel(trial, domain, study, live, actions) : {parts: [h('p', {class: 'soft small'},
      'Choose a trial in the plot or in the table to see its learning curve, its hyperparameters and how to export it.')], draw() {}};
    at('fixed').replaceChildren(...held.parts.flat(Infinity).filter(Boolean));
    held.draw();
    // Where the two stand beside one another, the plot is as tall as what is said of the fixed trial.
    const beside = at('fixed').offsetLeft > at('front').offsetLeft + 100;
    const room = beside ? at('fixed').scrollHeight - at('below').offsetHeight - 45 : 0;
    frontPlot(at('front'), shown, study, actions, room);
    at('table').replaceChildren(...trialTable(domain, shown).filter(Boolean));
    drawHistory(domain);
    drawParallelFigure(domain, shown);
  });
}

function render() {
  keeping(() => {
    head();
    const domain = domainNow(), main = at('main'), strip = tabs();
    if (domain) {
      main.replaceChildren(...[strip, panel(domain)].filter(Boolean));
      document.title = `${domain.name}: ${study.study}`;
      redraw = draw;
      draw();
    } else {
      const all = overview(study, view, actions);
      main.replaceChildren(...[strip, h('div', {class: 'stack', id: 'panel', role: 'tabpanel', 'aria-label': 'All domains'}, all.parts)].filter(Boolean));
      document.title = `${study.study}: Pareto fronts`;
      redraw = all.draw;
      all.draw();
    }
  });
}

// What is drawn anew keeps the keyboard's focus, where one has scrolled to, and what was unfolded.
let nested = false;

function keeping(change) {
  if (nested) { change(); return; }
  nested = true;
  const focus = document.activeElement?.getAttribute('data-focus');
  const scrolled = document.querySelector('[data-scroll=trials]'), top = scrolled?.scrollTop, left = scrolled?.scrollLeft;
  const open = new Set([...document.querySelectorAll('details[open] > summary')].map(item => item.textContent));
  change();
  nested = false;
  for (const summary of document.querySelectorAll('details > summary')) if (open.has(summary.textContent)) summary.parentElement.open = true;
  if (scrolled) document.querySelector('[data-scroll=trials]')?.scrollTo(left, top);
  if (focus && document.activeElement?.getAttribute('data-focus') !== focus) {
    const again = document.querySelector(`[data-focus="${CSS.escape(focus)}"]`);
    // What had it may be gone, as a button that has led to another tab: then the next key acts on what came instead.
    if (again) again.focus({preventScroll: true});
    else if (document.activeElement === document.body) (at('front') ?? at('main')).focus({preventScroll: true});
  }
}

// --- while the study runs ---

// Drawing anew would close the reader's open list, lose the slider under their finger, swallow a click between press and
// release, and forget the text that they mark: what has arrived waits until nothing is held.
let pressed = false, busyUntil = 0, listUntil = 0, arrived = null, stale = false;
const tellsOpen = CSS.supports('selector(select:open)');

function busyFor(milliseconds) { busyUntil = Math.max(busyUntil, performance.now() + milliseconds); }

function held() {
  const now = performance.now(), element = document.activeElement, selection = getSelection();
  const list = element?.tagName === 'SELECT' && (tellsOpen ? element.matches(':open') : now < listUntil);
  return pressed || list || now < busyUntil || (selection !== null && !selection.isCollapsed);
}

function watchHands() {
  const release = () => { pressed = false; busyFor(400); };
  addEventListener('pointerdown', event => {
    // An open list may keep the release to itself.
    if (event.target.closest?.('select')) listUntil = performance.now() + 30_000;
    else pressed = true;
  }, true);
  for (const kind of ['pointerup', 'pointercancel', 'blur']) addEventListener(kind, release);
  // The release may have been outside the window.
  addEventListener('pointermove', event => { if (pressed && event.buttons === 0) release(); }, true);
  addEventListener('keydown', event => {
    busyFor(400);
    if (event.target.closest?.('select')) listUntil = performance.now() + 30_000;
  }, true);
  addEventListener('input', () => busyFor(1000), true);
  addEventListener('change', () => { listUntil = 0; }, true);
}

function adopt(fresh) {
  const known = new Set(study.methods.map(method => method.name)), stateWas = study.state, name = domainNow()?.name;
  study = fresh;
  if (name !== undefined) view.domain = study.domains.findIndex(domain => domain.name === name);
  if (known.size !== study.methods.length) view.withoutMethods.clear();
  render();
  if (stateWas !== study.state) say(`The study is ${study.state}`);
}

let settling = null;

function settle() {
  clearTimeout(settling);
  if (!arrived && !stale) return;
  if (held()) { settling = setTimeout(settle, 200); return; }
  const fresh = arrived;
  arrived = null;
  stale = false;
  if (fresh) adopt(fresh); else keeping(head);
}

async function ask() {
  let wait = study.state === 'running' ? 3000 : 15000;
  if (!document.hidden) {
    try {
      const answer = await fetch(live.data, {headers: lastTag ? {'If-None-Match': lastTag} : {}, cache: 'no-store'});
      if (answer.status === 200) {
        arrived = decode(await answer.json());
        lastTag = answer.headers.get('ETag');
      } else if (answer.status !== 304) throw new Error(String(answer.status));
      stale ||= lost;
      lost = false;
    } catch {
      stale ||= !lost;
      lost = true;
      wait = 5000;
    }
    settle();
  }
  setTimeout(ask, wait);
}

recall();
render();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', render);
// Inside a frame whose page came with its element (a notebook's), the link would lead to the page around it.
document.querySelector('.skip').addEventListener('click', event => {
  event.preventDefault();
  document.getElementById('main').focus();
});
addEventListener('hashchange', () => { recall(); render(); });
let widthWas = innerWidth;
addEventListener('resize', () => {
  // A phone's address bar changes the height alone.
  if (innerWidth !== widthWas) { widthWas = innerWidth; redraw(); }
});
if (live) {
  watchHands();
  setTimeout(ask, 1500);
}
