"""What the page does in the browser itself: the box, the copy button, the file of a conversation."""

# Enter takes the text out of the box at once, so that what is typed during the reply is not touched again.
# No button to send: a reply is under way, and the text stays.
TAKE = """(typed, asked) => {
  const idle = document.querySelector('#box .submit-button');
  if (!idle || !typed.trim()) return [typed, asked];
  document.querySelector('#chat [role=log]')?.scrollTo(0, 1e9);
  return [{__type__: 'update', value: '', submit_btn: false}, typed];
}"""

# Whatever the page could not take (refused, no room in the queue, no server) is put back into the box.
GIVE_BACK = """(typed, asked) => {
  const value = [asked, typed].filter(text => text).join('\\n');
  return [{__type__: 'update', value, submit_btn: true, stop_btn: false}, ''];
}"""

# One row of training data: formats.py reads it as it is.
EXPORT = """(said, system) => {
  if (!said || !said.length) return [];
  const opening = system.trim() ? [{role: 'system', content: system.trim()}] : [];
  const text = JSON.stringify({messages: [...opening, ...said]}, null, 1);
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text + '\\n'], {type: 'application/json'}));
  link.download = `chat-${new Date().toISOString().slice(0, 19).replace(/:/g, '')}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
  return [];
}"""

# What runs as the page opens.
# FOLLOW: the end of a reply stays in sight as it comes, until the reader scrolls up; back at the end, again.
# Gradio's own autoscroll jumps to the end 0.3 s after each piece: nobody could scroll up meanwhile.
# TIDY: a message is copied and edited as it was written, without the side's name and the escapes that
# page_messages.escape_markup put in. Only https and localhost have navigator.clipboard; elsewhere gradio
# copies out of a text area that nobody sees.
FOLLOW = """
  const follow = () => {
    const log = document.querySelector('#chat [role=log]');
    if (!log) return setTimeout(follow, 50);
    let atEnd = true, last = 0;
    log.addEventListener('scroll', () => {
      const below = log.scrollHeight - log.clientHeight - log.scrollTop;
      if (below < 2) atEnd = true;
      else if (log.scrollTop < last) atEnd = false;
      last = log.scrollTop;
    });
    new MutationObserver(() => { if (atEnd) log.scrollTop = log.scrollHeight; })
      .observe(log, {childList: true, subtree: true, characterData: true});
  };
  follow();
"""
TIDY = """
  const code = /(^ {0,3}```[^`\\n]*$[^]*?(?:^ {0,3}```|$(?![^]))|(?<![\\\\`])`[^`\\n]+`(?!`))/m;
  const plain = part => part.replace(/&lt;/g, '<').replace(/!&#91;/g, '![').replace(/&amp;/g, '&');
  const tidy = text => text.replace(/^<small class="side">.*?<\\/small>\\n\\n/, '')
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
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(ofMessage ? tidy(text) : text);
  } else document.addEventListener('copy', event => {
    const area = document.activeElement;
    if (!ofMessage || area?.style.left !== '-999999px') return;
    event.clipboardData.setData('text/plain', tidy(area.value));
    event.preventDefault();
  });
"""
OPEN = f"() => {{{FOLLOW}{TIDY}}}"
