// The fixed trial: what it scored and cost, its learning curve, its hyperparameters, the command that exports it.

function deviation(mean, std) { return `${metricText(mean)} ± ${metricText(std)}`; }

const together = text => h('span', {class: 'together'}, text);

function numbersOf(trial, domain, study, live) {
  const model = study.models[trial.model], rows = [];
  if (trial.value !== null) {
    rows.push([`${domain.title}, validation`, metricText(trial.value), true]);
  }
  if (trial.confirmed) {
    rows.push([`over ${trial.confirmed.seeds} seeds`, together(deviation(trial.confirmed.mean, trial.confirmed.std))]);
    if (trial.confirmed.testMean !== null) rows.push(['on the test split', together(deviation(trial.confirmed.testMean, trial.confirmed.testStd ?? 0))]);
  }
  const share = model.parameters ? ` (${Number((100 * trial.trainable_parameters / model.parameters).toPrecision(2))} %)` : '';
  rows.push(['trainable parameters', together(whole(trial.trainable_parameters) + share)]);
  if (trial.exported_parameters !== null) rows.push(['exported parameters', whole(trial.exported_parameters)]);
  if (trial.train_seconds !== null) rows.push(['training time', timeText(trial.train_seconds)]);
  if (trial.peak_memory_bytes !== null) rows.push(['peak memory', sizeText(trial.peak_memory_bytes)]);
  const batch = AXES.batch_milliseconds;
  if (trial.batch_milliseconds !== null) rows.push([batch.title, batch.text(trial.batch_milliseconds)]);
  if (study.models.length > 1) rows.push(['model', model.name]);
  if (trial.state === 'RUNNING' && trial.steps) {
    rows.push(['steps', `${whole(trial.rungs.at(-1)?.step ?? 0)} of ${whole(trial.steps)}`]);
  }
  if (trial.run && live?.mlflow) {
    rows.push(['in MLflow', h('a', {href: `${live.mlflow}#/runs/${encodeURIComponent(trial.run)}`}, 'its run')]);
  } else if (trial.run) rows.push(['MLflow run', h('span', {class: 'code'}, trial.run)]);
  return h('dl', {class: 'numbers'}, rows.map(([title, text, main]) => [h('dt', {}, title), h('dd', {class: main && 'main'}, text)]));
}

const PICKS = {
  best: metric => `the front’s best ${metric}`,
  knee: () => 'where further parameters stop paying',
  smallest: () => 'fewest parameters on the front',
};

function badges(trial, domain) {
  const found = [];
  if (trial.state !== 'COMPLETE') found.push(h('span', {class: `chip ${trial.state}`}, trial.state.toLowerCase()));
  else if (domain.onFront.has(trial.number)) found.push(h('span', {class: 'chip front'}, 'on the front'));
  else found.push(h('span', {class: 'chip'}, 'dominated'));
  for (const [key, number] of Object.entries(domain.picks)) {
    if (number === trial.number) found.push(h('span', {class: 'chip'}, key));
  }
  return h('div', {class: 'badges'}, found);
}

function copyButton(text) {
  const button = h('button', {type: 'button', class: 'quiet', 'data-focus': 'copy', onclick: async () => {
    const code = button.parentElement.querySelector('code');
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    let done = false;
    try {
      await navigator.clipboard.writeText(text);
      done = true;
    } catch {
      // Pages from a file or in a frame may not write to the clipboard this way.
      done = document.execCommand('copy');
    }
    button.textContent = done ? 'Copied' : 'Selected';
    say(done ? 'The command was copied' : 'The command is selected: copy it');
    setTimeout(() => {
      button.textContent = 'Copy';
      // A marked text keeps a live page from being drawn anew.
      if (done) getSelection().removeAllRanges();
    }, 2000);
  }}, 'Copy');
  return button;
}

// The trial on the front that is at least as good with no more parameters.
function beatenBy(trial, domain, study) {
  return domain.front.map(number => study.byNumber.get(number)).findLast(other =>
    other.trainable_parameters <= trial.trainable_parameters && domain.better * (other.value - trial.value) >= 0);
}

function exportOf(trial, domain, study, actions) {
  const command = domain.commands[trial.number];
  if (command) {
    return [h('h4', {}, 'Take it home as a PEFT folder'), h('div', {class: 'command'}, h('code', {}, command), copyButton(command))];
  }
  if (trial.state === 'FAILED') return [h('h4', {}, 'Why it failed'), h('p', {class: 'error-text'}, trial.error ?? 'for a reason that is not known')];
  if (trial.state === 'RUNNING') return [];
  const other = finished(trial) ? beatenBy(trial, domain, study) : null;
  return [h('p', {class: 'small soft'}, 'Adapters are exported from the front. ',
    trial.state === 'PRUNED' ? 'The scheduler stopped this trial before the full budget.' : null,
    other ? ['No worse with no more parameters: ', h('button', {type: 'button', class: 'quiet', 'data-focus': 'beaten', onclick: () => actions.fix(other)},
      `trial ${other.number}`)] : null)];
}

function curveOf(trial, domain, study) {
  if (!trial.rungs.length) return {parts: [h('p', {class: 'small soft'}, 'Not evaluated yet.')], draw: () => {}};
  const host = h('div', {class: 'plot'}), method = study.methods[trial.method];
  const best = bestOf(domain.trials, domain.better), points = other => other.rungs
    .filter(rung => rung.value !== null).map(rung => [rung.epoch, rung.value]);
  const series = [{points: points(trial), colour: () => methodColour(method), dots: true}];
  const beside = best && best !== trial && best.rungs.length > 1;
  if (beside) series.unshift({points: points(best), colour: () => ink('edge'), dash: '4 3', opacity: 0.8});
  const columns = [
    {title: 'step', cell: rung => whole(rung.step)},
    {title: 'epoch', cell: rung => String(Number(rung.epoch.toPrecision(3)))},
    {title: domain.title, cell: rung => rung.value === null ? '' : metricText(rung.value)},
    {title: 'validation loss', cell: rung => rung.loss === null ? '' : metricText(rung.loss)},
    {title: 'training loss', cell: rung => rung.trainLoss === null ? '' : metricText(rung.trainLoss)},
  ];
  return {
    parts: [h('h4', {}, 'Learning curve', beside ? ` (dashed: the best, trial ${best.number})` : null), host,
      folded('Its evaluations as a table', plainTable(`Evaluations of trial ${trial.number}`, columns, trial.rungs))],
    draw: () => lineChart(host, {
      label: `Learning curve of trial ${trial.number}: ${points(trial).map(([epoch, value]) => `epoch ${shortNumber(epoch)} ${metricText(value)}`).join(', ')}`,
      x: 'epoch', y: domain.title, height: 170, log: domain.log,
      series: series.filter(item => item.points.length).map(item => ({...item, colour: item.colour()})),
    }),
  };
}

function trialPanel(trial, domain, study, live, actions) {
  const curve = curveOf(trial, domain, study);
  return {
    draw: curve.draw,
    parts: [
      h('div', {class: 'trial-head'}, h('h3', {}, `Trial ${trial.number} `, h('span', {class: 'soft'}, study.methods[trial.method].name)),
        h('button', {type: 'button', class: 'quiet', 'data-focus': 'release', 'aria-label': 'Release this trial', onclick: () => actions.fix(null)}, '✕')),
      badges(trial, domain), numbersOf(trial, domain, study, live), exportOf(trial, domain, study, actions),
      curve.parts,
      h('h4', {}, 'Hyperparameters'),
      trial.settings.length ? h('dl', {class: 'numbers', id: 'settings'}, trial.settings.map(([name, value]) =>
        [h('dt', {}, name), h('dd', {}, valueText(name, value))])) : h('p', {class: 'small soft'}, 'This method has none.'),
    ],
  };
}
