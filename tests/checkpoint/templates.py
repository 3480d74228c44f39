"""Chat templates as those of well-known families are made, each a small program of its own.

They are written anew. What they share with the originals is what a renderer must get right:
namespaces, `loop`, macros, slices, methods of strings, tests, filters, and white space.
"""

import tiny

FAMILIES = {}


def marked(source):
    """A piece of tiny's template with the marks of Qwen."""
    return source.replace(tiny.START, "<|im_start|>").replace(tiny.END, "<|im_end|>")


# A system text goes into the first question; roles alternate, or the template refuses them.
FAMILIES["llama-2"] = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}\
{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}\
{% set system = false %}{% endif %}{% for m in rest %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}\
{% if loop.index0 == 0 and system != false %}\
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}\
{% else %}{% set content = m['content'] %}{% endif %}\
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}\
{% endfor %}"""

FAMILIES["llama-3"] = """\
{% for m in messages %}{% set text = '<|head|>' + m['role'] + '<|/head|>\\n\\n' + m['content'] \
| trim + '<|eot|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"""

FAMILIES["llama-3.1"] = """\
{{- bos_token }}
{%- if own_tools is defined %}
    {%- set tools = own_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "1 Jan 2024" %}
{%- endif %}
{%- set first, turns = "", messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- macro head(role) %}{{ '<|head|>' + role + '<|/head|>\\n\\n' }}{% endmacro %}
{{- head('system') + "Today Date: " + date_string + "\\n\\n" + first + "<|eot|>" }}
{%- if tools is not none and turns | length == 0 %}
    {{- raise_exception("no first question") }}
{%- endif %}
{%- for turn in turns %}
    {%- if 'tool_calls' in turn %}
        {%- if not turn.tool_calls | length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = turn.tool_calls[0].function %}
        {{- head('assistant') -}}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- elif turn.role in ["tool", "ipython"] %}
        {{- head('ipython') }}
        {%- if turn.content is mapping or turn.content is iterable %}
            {{- turn.content | tojson }}
        {%- else %}
            {{- turn.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- else %}
        {{- head(turn.role) + turn['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- head('assistant') }}
{%- endif %}"""

FAMILIES["mistral"] = """\
{%- set turns = messages %}
{%- if messages[0]["role"] == "system" %}
    {%- set before = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- set asked = turns | selectattr("role", "equalto", "user") | list %}
{%- set count = namespace() %}
{%- set count.turns = 0 %}
{%- for turn in turns if turn.tool_calls is not defined or turn.tool_calls is none %}
    {%- if (turn["role"] == "user") != (count.turns % 2 == 0) %}
        {{- raise_exception("user and assistant should alternate") }}
    {%- endif %}
    {%- set count.turns = count.turns + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn["role"] == "user" and turn == asked[-1] and before is defined %}
        {{- "[INST] " + before + "\\n\\n" + turn["content"] + "[/INST]" }}
    {%- elif turn["role"] == "user" %}
        {{- "[INST] " + turn["content"] + "[/INST]" }}
    {%- elif turn["role"] == "assistant" %}
        {{- " " + turn["content"] | trim + eos_token}}
    {%- else %}
        {{- raise_exception("no role " ~ turn["role"]) }}
    {%- endif %}
{%- endfor %}"""

FAMILIES["qwen-2"] = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FAMILIES["qwen-3"] = (
    """\
{%- if tools %}
    {%- for tool in tools %}
        {{- "\\n" + tool | tojson }}
    {%- endfor %}
{%- endif %}
{%- set seen = namespace(open=true, question=messages | length - 1) %}
{%- for m in messages[::-1] %}
    {%- set result = m.content is string and m.content.startswith('<tool_response>') %}
    {%- if seen.open and m.role == "user" and not (result and m.content.endswith('>')) %}
        {%- set seen.open = false %}
        {%- set seen.question = messages | length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set m = message %}
    {%- set text = m.content if m.content is string else '' %}
    {%- if m.role == "assistant" %}
        {%- set said = text %}"""
    + marked(tiny.REPLY)
    + """
    {%- elif m.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + text + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif m.role == "user" or loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}"""
    + marked(tiny.HEAD_OF_REPLY)
)

FAMILIES["deepseek-r1"] = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}\
{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}\
{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}\
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}\
{{'<｜User｜>' + message['content']}}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}\
{%- if ns.is_tool %}{{'<｜tool end｜>' + message['content'] + eos_token}}\
{%- set ns.is_tool = false -%}\
{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}\
{% set content = content.split('</think>')[-1] %}{% endif %}\
{{'<｜Assistant｜>' + content + eos_token}}{%- endif %}{%- endif %}\
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}\
{{'<｜tool｜>' + message['content']}}\
{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<｜tool end｜>'}}{% endif %}\
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

FAMILIES["chatml-generation"] = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

FAMILIES["phi-3"] = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}\
{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

FAMILIES["gemma"] = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('no system text') }}\
{% endif %}
{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate") }}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set role = 'model' -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] if item['type'] == 'text' -%}
            {{ item['text'] | trim }}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

# Line breaks and indents of the source, which trim_blocks and lstrip_blocks take out.
FAMILIES["zephyr"] = """\
{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
    {% else %}
        {% continue %}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
    {% endif %}
{% endfor %}
"""

FAMILIES["vicuna"] = """\
{% if messages[0].role == 'system' %}{{ messages[0].content.strip() ~ ' ' }}{% else %}\
{{ "A chat between a curious user and an assistant." ~ ' ' }}{% endif %}\
{% for m in messages if m.role != 'system' %}{% if loop.previtem is defined and \
loop.previtem.role == m.role %}{{ raise_exception(m.role | upper ~ ' twice at ' ~ loop.index) }}\
{% endif %}{{ m.role | upper }}: {{ m.content | trim }}\
{{ eos_token if m.role == 'assistant' else ' ' }}\
{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"""

FAMILIES["command-r"] = """\
{%- macro turn(role, content) -%}
    {{- '<|START|><|' ~ role | upper ~ '|>' ~ content.strip() ~ '<|END|>' -}}
{%- endmacro -%}
{%- macro document(doc, index=0) %}
Document: {{ index }}
{% for key, value in doc | dictsort %}
{{ key | title }}: {{ value }}
{% endfor %}
{%- endmacro -%}
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set loop_messages = messages[1:] %}
    {%- set preamble = messages[0]['content'] %}
{%- else %}
    {%- set loop_messages = messages %}
    {%- set preamble = 'You are Command.' %}
{%- endif %}
{{- turn('system', '# Preamble\\n' + preamble) }}
{%- for doc in documents or [] %}{{ document(doc, index=loop.index0) }}{% endfor %}
{%- for message in loop_messages %}
    {%- set names = {'user': 'user', 'assistant': 'chatbot', 'tool': 'results'} %}
    {%- set name = names[message.role] if message.role in names else message.role %}
    {{- turn(names.get(message.role, name), message.content) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|START|><|CHATBOT|>' }}
{%- endif %}"""

FAMILIES["granite"] = """\
{%- set now = strftime_now('%B %d, %Y') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Knowledge Cutoff Date: April 2024.\\nToday's Date: " + now + "." %}
    {%- if tools and documents %}
        {%- set system_message = system_message + " You have tools and documents." %}
    {%- endif %}
    {%- if controls and 'length' in controls %}
        {%- set system_message = system_message + " Length: " + controls['length'] %}
    {%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- if tools %}
    {{- '<|start_of_role|>tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\\n' }}
{%- endif %}
{%- if documents %}
    {%- for document in documents %}
        {{- 'Document ' + loop.index | string + '\\n' + document['text'] }}
        {%- if not loop.last %}{{- '\\n\\n' }}{%- endif %}
    {%- endfor %}
{%- endif %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] }}
    {{- '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
        {%- if controls %}
            {{- ' ' + controls | tojson() }}
        {%- endif %}
        {{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""

FAMILIES["gpt-oss"] = """\
{#- a comment -#}
{%- macro render(name, spec, indent=2) -%}
    {%- if spec is mapping -%}
        {{- name ~ ': {' ~ '\\n' ~ ' ' * indent -}}
        {%- for key, value in spec.items() -%}
            {{- render(key, value, indent + 2) -}}{{- ', ' if not loop.last -}}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif spec is string -%}
        {{- name ~ ': "' ~ spec | replace('"', "'") ~ '"' -}}
    {%- elif spec is sequence -%}
        {{- name ~ ': ' ~ spec | map('string') | join('|') -}}
    {%- elif spec is number -%}
        {{- name ~ ': ' ~ '%04d' | format(spec) -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro build_system() -%}
    {%- if model_identity is not defined %}
        {%- set model_identity = "You are a language model." %}
    {%- endif %}
    {{- model_identity + "\\n" }}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
    {%- if reasoning_effort is not defined %}
        {%- set reasoning_effort = "medium" %}
    {%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\\n\\n" }}
    {{- "# Valid channels: analysis, final." }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}
{{- build_system() }}
{{- "<|end|>" }}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}
    {%- set developer_message = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer_message = "" %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if developer_message or tools %}
    {{- "<|start|>developer<|message|># Instructions\\n\\n" + developer_message + "<|end|>" }}
{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "<|channel|>" in message.content %}
            {{- raise_exception("You have passed channel tags in the content field.") }}
        {%- endif %}
        {%- if loop.last and not add_generation_prompt %}
            {%- if "thinking" in message %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" }}
                {{- message.thinking + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
            {%- set last_tool_call.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {{- "<|start|>tool<|message|>" + message.content|tojson + "<|end|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
    {%- if message.facts is defined -%}{{- render('facts', message.facts) -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}"""
