//go:build race

package main

// hashRounds is as in rounds.go, but for the race detector, with which they would
// take seconds. It is for tests, and no such binary for people's passwords.
const hashRounds = 6_000
