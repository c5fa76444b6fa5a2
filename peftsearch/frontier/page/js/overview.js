// All domains beside one another: small fronts, and each method's best.

function bestOf(trials, better) {
  return trials.filter(finished).reduce((best, trial) => !best || better * (trial.value - best.value) > 0 ||
    (trial.value === best.value && trial.trainable_parameters < best.trainable_parameters) ? trial : best, null);
}

function overview(study, view, actions) {
  const draws = [], figures = study.domains.map(domain => {
    const host = h('div', {class: 'plot'}), best = study.byNumber.get(domain.picks.best);
    draws.push(() => drawFront(host, chosen(domain, view), study, {small: true}));
    return h('figure', {class: 'card figure'}, h('figcaption', {class: 'figure-head'},
      h('h3', {class: 'name'}, domain.name),
      h('button', {type: 'button', class: 'quiet', 'data-focus': `open-${domain.index}`, onclick: () => actions.open(domain.index)}, 'Open')),
    host, h('p', {class: 'small soft'}, best
      ? `${domain.title} ${metricText(best.value)} with ${whole(best.trainable_parameters)} parameters (${study.methods[best.method].name}); hypervolume ${domain.hypervolume.toFixed(4)}`
      : 'No trial has reached the full budget yet.'));
  });
  const cell = (domain, method) => {
    const trial = bestOf(domain.trials.filter(other => other.method === method), domain.better);
    if (!trial) return h('td', {}, h('span', {class: 'soft'}, 'none'));
    const text = metricText(trial.value), top = trial.number === domain.picks.best;
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
    h('tr', {}, h('th', {scope: 'row', class: 'l'}, 'hypervolume'), study.domains.map(domain => h('td', {}, domain.hypervolume.toFixed(4)))))))) ;
  return {parts: [h('h2', {}, 'All domains'), h('div', {class: 'grid-of'}, figures), table], draw: () => draws.forEach(draw => draw())};
}
