// All domains beside one another: small fronts, and each method's best.

// Where there are no controls that filter, nothing is filtered.
const WHOLE = {withoutMethods: new Set(), model: null, budget: null, dominated: true, pruned: true};

function overview(study, view, actions) {
  const every = study.domains.map(domain => chosen(domain, {...WHOLE, axis: view.axis}));
  const draws = [], figures = study.domains.map(domain => {
    const shown = every[domain.index], best = bestOf(domain.trials, domain.better), front = `The front of ${domain.name}`;
    const host = h('div', {class: 'plot', role: 'img', 'aria-label': `${domain.name}: ${domain.title} against ${AXES[shown.axis].title}, ` +
      `${shown.placed.length} trials, ${shown.front.length} on the front.${shown.front.length ? ' The table below has the front.' : ''}`});
    draws.push(() => drawFront(host, shown, study, {small: true}));
    const columns = columnsOf(domain, shown, trial => actions.open(domain.index, trial)).filter(column => column.key !== 'state');
    return h('figure', {class: 'card figure'}, h('figcaption', {class: 'figure-head'},
      h('h3', {class: 'name'}, domain.name),
      h('button', {type: 'button', class: 'quiet', 'data-focus': `open-${domain.index}`, onclick: () => actions.open(domain.index)}, 'Open')),
    host, h('p', {class: 'small soft'}, best
      ? `${domain.title} ${metricText(best.value)} with ${whole(best.trainable_parameters)} parameters (${study.methods[best.method].name})${saysNothing(domain) ? '' : `; hypervolume ${domain.hypervolume.toFixed(4)}`}`
      : 'No trial has reached the full budget yet.'),
    shown.front.length ? folded(`${front}, as a table`, plainTable(front, columns, shown.front)) : null);
  });
  const cell = (domain, method) => {
    const trial = bestOf(domain.trials.filter(other => other.method === method), domain.better);
    if (!trial) return h('td', {}, h('span', {class: 'soft'}, 'none'));
    const text = metricText(trial.value), top = trial === bestOf(domain.trials, domain.better);
    return h('td', {}, h('button', {type: 'button', class: 'go', 'data-focus': `cell-${domain.index}-${method}`,
      onclick: () => actions.open(domain.index, trial)}, top ? h('b', {}, text) : text),
    h('span', {class: 'soft'}, ` ${si(trial.trainable_parameters)}`));
  };
  const label = 'Best of each method by domain';
  const table = h('div', {class: 'card'}, h('div', {class: 'table-head'}, h('h3', {}, label),
    h('span', {class: 'small soft'}, 'the metric on the validation split, and trainable parameters; bold: the domain’s best')),
  h('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': label}, h('table', {'aria-label': label},
    h('thead', {}, h('tr', {}, h('th', {scope: 'col', class: 'l'}, 'method'), study.domains.map(domain =>
      h('th', {scope: 'col'}, domain.name, h('br', {}), domain.title)))),
    h('tbody', {}, study.methods.map((method, index) => h('tr', {}, h('th', {scope: 'row', class: 'l'}, glyph(method), ' ', method.name),
      study.domains.map(domain => cell(domain, index)))),
    h('tr', {}, h('th', {scope: 'row', class: 'l'}, 'hypervolume'), study.domains.map(domain => h('td', {},
      saysNothing(domain) ? h('span', {class: 'soft'}, 'says nothing') : domain.hypervolume.toFixed(4)))))))) ;
  const key = keyOf({
    placed: every.flatMap(shown => shown.placed), bold: new Set(every.flatMap(shown => shown.front)),
    domain: {baselines: study.domains.flatMap(domain => domain.baselines)},
  });
  return {parts: [h('h2', {}, 'All domains'), h('div', {class: 'grid-of'}, figures), key, table], draw: () => draws.forEach(draw => draw())};
}
