() => {
  // What the page does in the browser itself: the box, the copy button, the file of a conversation.
  // This function runs once, as the page opens; gradio's events call what it leaves in window.chatPage.
  const same = {__type__: 'update'};

  // The box is emptied and filled within one step of the browser, never by an event's output: a letter that
  // is typed while an output is under way would be lost.
  const find = () => document.querySelector('#box textarea');
  const write = text => {
    find().value = text;
    find().dispatchEvent(new Event('input', {bubbles: true}));
  };

  // Enter, before gradio hears of it. No button to send, or a message that has no answer yet: the text stays.
  let text = '', waits = false;  // of the message that is on its way
  const take = () => {
    const idle = document.querySelector('#box .submit-button') && !waits;
    if (!idle || !find().value.trim()) return;
    text = find().value;
    waits = true;
    write('');
  };
  document.addEventListener('keypress', event => {
    if (event.key === 'Enter' && !event.shiftKey && event.target.matches?.('#box textarea')) take();
  }, true);
  document.addEventListener('click', event => {
    if (event.target.closest?.('#box .submit-button')) take();
  }, true);

  // What was taken is on its way, as gradio's event says.
  const send = () => {
    const taken = text;
    text = '';
    if (!taken) return [same, same];
    document.querySelector('#chat [role=log]')?.scrollTo(0, 1e9);
    return [{...same, submit_btn: false}, taken];
  };

  // Whatever the page could not take (refused, no room in the queue, no server) is put back into the box.
  const putBack = asked => {
    if (asked) write([asked, find().value].filter(text => text).join('\n'));
    return '';
  };
  const end = asked => {
    waits = false;
    return [{...same, submit_btn: true, stop_btn: false}, putBack(asked)];
  };

  // One row of training data: formats.py reads it as it is.
  const save = (said, system) => {
    if (!said || !said.length) return [];
    const opening = system.trim() ? [{role: 'system', content: system.trim()}] : [];
    const row = JSON.stringify({messages: [...opening, ...said]}, null, 1);
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([row + '\n'], {type: 'application/json'}));
    link.download = `chat-${new Date().toISOString().slice(0, 19).replace(/:/g, '')}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
    return [];
  };

  // The end of a reply stays in sight as it comes, until the reader scrolls up; back at the end, again.
  // Gradio's own autoscroll jumps to the end 0.3 s after each piece: nobody could scroll up meanwhile.
  const follow = () => {
    const log = document.querySelector('#chat [role=log]');
    if (!log) return setTimeout(follow, 50);
    let atEnd = true, last = 0;
    // A thought that the reader opens or folds stays so, although each piece of its reply draws it anew.
    let chosen = {};
    const thoughts = () => [...log.querySelectorAll('.thought')];
    log.addEventListener('click', event => {
      const thought = event.target.closest?.('summary')?.closest('.thought');
      if (thought) chosen[thoughts().indexOf(thought)] = !thought.open;
    });
    const restore = () => {
      if (!thoughts().length) chosen = {};
      thoughts().forEach((thought, i) => { if (i in chosen) thought.open = chosen[i]; });
    };
    log.addEventListener('scroll', () => {
      const below = log.scrollHeight - log.clientHeight - log.scrollTop;
      if (below < 2) atEnd = true;
      else if (log.scrollTop < last) atEnd = false;
      last = log.scrollTop;
    });
    new MutationObserver(() => {
      restore();
      if (atEnd) log.scrollTop = log.scrollHeight;
    })
      .observe(log, {childList: true, subtree: true, characterData: true});
  };
  follow();

  // A message is copied and edited as it was written, without the side's name, a thought and the escapes that
  // page_messages.escape_markup put in. Only https and localhost have navigator.clipboard; elsewhere gradio
  // copies out of a text area that nobody sees.
  const code = /(^ {0,3}```[^`\n]*$[^]*?(?:^ {0,3}```|$(?![^]))|(?<![\\`])`[^`\n]+`(?!`))/m;
  const plain = part => part.replace(/&lt;/g, '<').replace(/!&#91;/g, '![').replace(/&amp;/g, '&');
  const unpair = text => text.startsWith('<div class="pair">') ? text
    .replace(/<small class="side">(.*?)<\/small>/g, '$1:').replace(/\s*<\/?div[^>]*>\s*/g, '\n\n').trim() : text;
  const tidy = text => unpair(text).replace(/^<small class="side">.*?<\/small>\n\n/, '')
    .replace(/^<details class="thought".*?<\/details>\n\n/, '')
    .split(code).map((part, i) => i % 2 ? part : plain(part)).join('');
  let ofMessage = false;
  document.addEventListener('click', event => {
    ofMessage = Boolean(event.target.closest?.('.message-buttons'));
    if (ofMessage) setTimeout(() => {
      const area = document.querySelector('#chat .edit-textarea:not([data-tidy])');
      if (!area) return;
      area.dataset.tidy = true;
      area.value = tidy(area.value);
      area.dispatchEvent(new Event('input', {bubbles: true}));
    });
  }, true);
  if (navigator.clipboard) {
    const copy = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => copy(ofMessage ? tidy(text) : text);
  } else document.addEventListener('copy', event => {
    const area = document.activeElement;
    if (!ofMessage || area?.style.left !== '-999999px') return;
    event.clipboardData.setData('text/plain', tidy(area.value));
    event.preventDefault();
  });

  window.chatPage = {send, putBack, end, save};
}
