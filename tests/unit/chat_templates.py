"""Chat templates of the usual makes, in short, for tokenizers of `tiny_tokenizers`."""

# Contents are strings; tools are printed.
CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content and loop.last %}{{ '<think>' + message.reasoning_content }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' }}{{ call | tojson }}
{{- call.function.arguments | tojson }}{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}{{ '<|im_start|>tool ' }}{{ message.name }}{{ message.tool_call_id }}
{{- '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if documents %}{{ documents | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}
{%- if reasoning_effort %}{{ reasoning_effort }}{% endif %}{% endif %}"""

# Contents are lists of parts; a begin token; pictures have a token of their own.
PARTS = """\
{{- bos_token }}
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{ message['content'] | trim }}
{%- else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<tool_call>' }}
{%- elif 'text' in part %}{{ part['text'] | trim }}{% endif %}
{%- endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# By way of a macro, and developers are known.
MACRO = """\
{%- macro render(body) %}{% if body is string %}{{ body }}{% else %}
{%- for item in body %}{{ item.text }}{% endfor %}{% endif %}{% endmacro %}
{%- set rest = messages[1:] if messages[0].role == 'developer' else messages %}
{%- for message in rest %}{{ '<|im_start|>' ~ message.role ~ ': ' ~ render(message.content) ~ '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"""

# No added token in it, and it refuses whom it does not know.
PLAIN = """\
{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}
{{ raise_exception('no such role') }}{% endif %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

TEMPLATES = {"chatml": CHATML, "parts": PARTS, "macro": MACRO, "plain": PLAIN}
