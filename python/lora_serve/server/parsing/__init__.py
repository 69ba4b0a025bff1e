"""From the text of an answer to its parts: reasoning, content, tool calls; whole or as the text comes."""
