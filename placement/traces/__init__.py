"""Where tokens went: traces in memory and streamed, other programs' recordings, and what is counted from them."""
