"""Tables on a terminal that are tables in Markdown too."""


def markdown_table(rows: dict[str, str]) -> str:
    """Names and values as a Markdown table, its columns aligned."""
    width = max(map(len, rows))
    lines = [f"| {name:<{width}} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {'':<{width}} | |", f"| {'-' * width} | --- |", *lines])
