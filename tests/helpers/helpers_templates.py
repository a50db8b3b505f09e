"""Small chat templates in the form of the published ones of Coder, Instruct and Thinking."""

OTHERS = """
{%- for m in messages %}
{%- if m.role == "tool" %}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif m.role != "assistant" %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}"""
END = """{{ '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\nOPENING' }}{% endif %}"""
JSON_CALLS = """
{%- for c in m.tool_calls or [] %}
{%- if not loop.first or m.content %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}"""
CODER = (
    OTHERS
    + """{{ '<|im_start|>assistant' }}
{%- if not m.tool_calls %}{{ '\\n' + m.content }}
{%- elif m.content | trim %}{{ '\\n' + m.content | trim + '\\n' }}{% endif %}
{%- for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n<function=' + c.function.name + '>\\n' }}
{%- for k, v in c.function.arguments | items %}{{ '<parameter=' + k + '>\\n' }}
{{- v | tojson if v is mapping or (v is sequence and v is not string) else v | string }}
{{- '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}"""
    + END.replace("OPENING", "")
)
INSTRUCT = (
    OTHERS
    + "{{ '<|im_start|>assistant\\n' + m.content }}"
    + JSON_CALLS
    + END.replace("OPENING", "")
)
THINKING = (
    OTHERS
    + """{{ '<|im_start|>assistant\\n' }}
{%- if m.reasoning_content %}
{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content.lstrip('\\n') }}"""
    + JSON_CALLS
    + END.replace("OPENING", "<think>\\n")
)

# As published: reasoning is shown after the last question alone, so within a loop of tool calls.
FORGETFUL = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}""" + THINKING.replace(
    "if m.reasoning_content", "if m.reasoning_content and loop.index0 > ns.last"
)
