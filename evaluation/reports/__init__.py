"""Results for people: tables, plots, contact sheets, one page; and the README's numbers checked."""
