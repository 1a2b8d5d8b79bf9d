# Entries of a lock file with their hashes: with -v part=only those of packages whose name matches `pattern`, with
# -v part=rest all others. Comments go with the entry above them.
/^[A-Za-z0-9]/ {
    name = $0
    sub(/==.*/, "", name)
    matches = name ~ pattern
}
name != "" && (part == "only" ? matches : !matches)
