//go:build !race

package main

// hashRounds of PBKDF2-SHA-256 take about a tenth of a second.
const hashRounds = 600_000
