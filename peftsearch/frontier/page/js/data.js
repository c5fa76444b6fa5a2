// The data as objects; which trials the filters leave, and which of these form a front.

const AXES = {
  trainable_parameters: {title: 'trainable parameters', text: whole, tick: si, log: true},
  exported_parameters: {title: 'exported size (parameters)', text: whole, tick: si, log: true},
  train_seconds: {title: 'training time', text: timeText, tick: value => `${Number(value.toPrecision(3))} s`},
  peak_memory_bytes: {title: 'peak memory', text: sizeText, tick: value => `${Number((value / 2 ** 20).toPrecision(3))} MiB`},
  batch_milliseconds: {title: 'time per example, in batches (ms)', text: value => String(Number(value.toPrecision(3))), tick: si},
};

function decode(data) {
  const columns = data.trials, keys = columns.keys.map(names => new Set(names));
  const trials = columns.number.map((number, index) => {
    const method = columns.method[index], [ladder, values, losses, trainLosses] = columns.rungs[index];
    const [steps, epochs] = columns.ladders[ladder] ?? [[], []], confirmed = columns.confirmed[index];
    const settings = columns.names[method]
      .map((name, place) => [name, columns.hyperparameters[index][place]])
      .filter(([, value]) => value !== null && value !== undefined);
    return {
      number, method, settings,
      // In tables and beside the mouse: what tells a method's trials apart.
      short: settings.filter(([name, value]) => keys[method].has(name) && value !== ''),
      domain: columns.domain[index],
      model: columns.model[index],
      state: columns.states[columns.state[index]],
      value: columns.value[index],
      trainable_parameters: columns.trainable_parameters[index],
      exported_parameters: columns.exported_parameters[index],
      train_seconds: columns.train_seconds[index] || null,
      peak_memory_bytes: columns.peak_memory_bytes[index],
      batch_milliseconds: columns.batch_milliseconds[index],
      steps: columns.steps[index],
      seed: columns.seed[index],
      error: columns.error[index],
      run: columns.run[index],
      confirmed: confirmed && {
        seeds: confirmed[0], mean: confirmed[1], std: confirmed[2], testMean: confirmed[3], testStd: confirmed[4],
      },
      rungs: steps.map((step, place) => ({
        step, epoch: epochs[place], value: values[place], loss: losses[place], trainLoss: trainLosses[place],
      })),
    };
  });
  const study = {...data, trials, byNumber: new Map(trials.map(trial => [trial.number, trial]))};
  study.domains = data.domains.map((domain, index) => {
    const mine = trials.filter(trial => trial.domain === index);
    return {
      ...domain, index, trials: mine, onFront: new Set(domain.front),
      better: domain.direction === 'maximize' ? 1 : -1,
      title: domain.metric.replaceAll('_', ' '),
      axes: Object.keys(AXES).filter(key => key === 'trainable_parameters' || mine.some(trial => trial[key] > 0)),
    };
  });
  return study;
}

const finished = trial => trial.state === 'COMPLETE' && trial.value !== null;

// The best metric; of equals, the fewest parameters. The pick "best" may be another trial, which is tied with this one.
function bestOf(trials, better) {
  return trials.filter(finished).reduce((best, trial) => !best || better * (trial.value - best.value) > 0 ||
    (trial.value === best.value && trial.trainable_parameters < best.trainable_parameters) ? trial : best, null);
}

// Hypervolume takes the metric to lie between 0 and 1: of a perplexity it says nothing.
function saysNothing(domain) {
  const outside = domain.trials.filter(finished).every(trial => trial.value < 0 || trial.value > 1);
  return domain.front.length > 0 && domain.hypervolume === 0 && outside;
}

const settingsText = trial => trial.short.map(([name, value]) => settingText(name, value)).join(' ');
const xOf = (trial, axis) => axis.endsWith('parameters') && trial[axis] !== null ? Math.max(trial[axis], 1) : trial[axis];

// Trials that no other beats in the metric without more of what is on the axis; equal ones are all kept.
function frontOf(trials, axis, better) {
  const candidates = trials.filter(trial => finished(trial) && trial[axis] !== null).sort((a, b) =>
    a[axis] - b[axis] || better * (b.value - a.value) || a.number - b.number);
  const found = [];
  for (const trial of candidates) {
    const last = found.at(-1);
    if (!last || better * (trial.value - last.value) > 0 || (trial.value === last.value && trial[axis] === last[axis])) {
      found.push(trial);
    }
  }
  return found;
}

// What the reader's filters leave of a domain, and how it is drawn.
function chosen(domain, view) {
  const trials = domain.trials.filter(trial =>
    !view.withoutMethods.has(trial.method) && (view.model === null || trial.model === view.model) &&
    (view.budget === null || trial.trainable_parameters <= view.budget));
  const axis = domain.axes.includes(view.axis) ? view.axis : 'trainable_parameters';
  const front = frontOf(trials, axis, domain.better), bold = new Set(front);
  const placed = trials.filter(trial => trial.value !== null && trial[axis] !== null && (bold.has(trial) ||
    (trial.state === 'COMPLETE' && view.dominated) || (trial.state === 'PRUNED' && view.pruned) || trial.state === 'RUNNING'));
  return {domain, axis, trials, front, bold, placed};
}
