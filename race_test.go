//go:build race

package main

// With the race detector the rounds would take seconds.
func init() { hashRounds = 6_000 }
