// Notification-server tells Seafile's clients and web pages at once what changed.
//
// seaf-server posts every change to it, and it pushes the change over WebSocket
// to whoever has subscribed to that library: the library was updated, a file
// lock changed, a folder's permission changed, a file was commented. An event is
// delivered, or the connection is closed, so that its client asks Seafile anew.
//
// Usage:
//
//	notification-server -c DIR [-l FILE]          serve
//	notification-server -c DIR -check [URL ...]   test a running server
//	notification-server -version | -h
//
// DIR holds seafile.conf; it may also name that file itself. The log is appended
// to FILE; without -l, or with -l -, it goes to standard error. The section
// [notification] configures it; the environment, where not empty, comes first:
//
//	enabled          false: do not run (default true)
//	host             address to listen on (0.0.0.0)     NOTIFICATION_SERVER_HOST
//	port             port to listen on (8083)           NOTIFICATION_SERVER_PORT
//	log_level        debug, info, warning, error (info) NOTIFICATION_SERVER_LOG_LEVEL
//	jwt_private_key  the key shared with seaf-server    JWT_PRIVATE_KEY
//	metrics          HOST:PORT for /metrics (off)       NOTIFICATION_SERVER_METRICS
//
// A value is everything behind the first "=". With JWT_PRIVATE_KEY set, the file may
// be missing. SEAFILE_RPC_PIPE_PATH names the directory of seafile.sock, where
// seaf-server is asked for the members of groups. SEAFILE_LOG_TO_STDOUT=true logs to
// standard output. SIGUSR1 opens the log anew, SIGUSR2 writes the metrics to it.
//
// -check does all that seaf-server and a client do, at the URL by which clients come, or
// at host and port. With a URL for each server of a cluster, an event posted once, to
// INNER_NOTIFICATION_SERVER_URL or host and port, must reach all. A good and a bad run:
//
//	✓ configuration: conf/seafile.conf
//	✓ ping: http://127.0.0.1:8083/ping answers pong
//	✓ upgrade: goes through, for the desktop client and for a browser
//	✓ subscription: a good token is accepted, a broken one is answered jwt-expired
//	✓ event: posted to http://127.0.0.1:8083/events, it arrived after 1.2ms
//	✓ forgery: an event posted with a client's token is refused
//	✓ group members: seaf-server answers on runtime/seafile.sock
//	✓ connection: still there after a ping
//	It works: a notification takes 1.2ms.
//
//	✗ ping: https://cloud.example.com/notification/ping answers 502: the proxy cannot reach ...
//	- upgrade: not tried, since a step before it failed
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// ---- Flags and main ----

//go:embed main.go
var source string // for -h: the comment at its top is the manual

type clock struct {
	wall   func() time.Time     // time of day: tokens expire by it, also after it was set anew
	uptime func() time.Duration // since the start: silence and delays are measured by it, it never jumps
}

func main() {
	ballast := make([]byte, 32<<20) // never touched: the garbage collector runs less often for it, for 8 % less CPU an event
	start := time.Now()
	status := run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr, clock{time.Now, func() time.Duration { return time.Since(start) }})
	runtime.KeepAlive(ballast)
	os.Exit(status)
}

// A problem is an error that says what was wrong and what to do.
type problem struct {
	status int    // of HTTP or of a close frame, where that is the answer
	reason string // a word for the metrics
	text   string
}

func (p *problem) Error() string { return p.text }

// refuseIf ends a function by a panic, as parsers of the standard library do: catch or guard makes an error of it.
func refuseIf(condition bool, status int, reason, format string, args ...any) {
	if condition {
		panic(&problem{status, reason, fmt.Sprintf(format, args...)})
	}
}
func failIf(condition bool, format string, args ...any) { refuseIf(condition, 0, "", format, args...) }

// catch, deferred, returns a problem as err, and lets other panics pass.
func catch(err *error) {
	if p := recover(); p != nil {
		var ok bool
		if *err, ok = p.(*problem); !ok {
			panic(p)
		}
	}
}

// run returns the exit status: 0 after a stop or if disabled, 1 if the server cannot run, 2 for wrong flags.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer, clk clock) int {
	manual, _, _ := strings.Cut(source, "package main")
	manual = strings.NewReplacer("\n//\t", "\n  ", "\n// ", "\n", "\n//", "\n").Replace("\n" + manual)[1:]
	flags := flag.NewFlagSet("notification-server", flag.ContinueOnError)
	flags.SetOutput(stderr)
	usage := manual[strings.Index(manual, "Usage:"):strings.Index(manual, "DIR holds")]
	flags.Usage = func() { fmt.Fprint(stderr, usage) }
	dir := flags.String("c", "", "")
	logFile := flags.String("l", "-", "")
	check := flags.Bool("check", false, "")
	version := flags.Bool("version", false, "")
	help := flags.Bool("h", false, "")
	switch err := flags.Parse(args); {
	case err != nil: // and flags has said so
		return 2
	case flags.NArg() > 0 && !*check, *dir == "" && !*help && !*version:
		fmt.Fprintf(stderr, "notification-server: -c DIR is missing, or %q is too much\n%s", flags.Args(), usage)
		return 2
	case *help:
		fmt.Fprint(stdout, manual)
		return 0
	case *version:
		info, _ := debug.ReadBuildInfo()
		fmt.Fprintln(stdout, "notification-server", info.Main.Version, info.GoVersion)
		return 0
	case *check:
		return runCheck(*dir, flags.Args(), getenv, stdout)
	}
	lg := openLog(*logFile, getenv("SEAFILE_LOG_TO_STDOUT") == "true", stdout, stderr)
	if err := serve(*dir, getenv, lg, clk); err != nil {
		lg.errorf("%v", err)
		if lg.path != "-" { // an administrator looks in the log, and where it was started
			fmt.Fprintf(stderr, "notification-server: %v\n", err)
		}
		return 1
	}
	return 0
}

func serve(dir string, getenv func(string) string, lg *logger, clk clock) (err error) { // until it is stopped
	defer catch(&err)
	signal.Ignore(syscall.SIGPIPE) // or Go would end here when standard error has nobody who reads it
	cfg := loadConfig(dir, getenv)
	for _, warning := range cfg.warnings {
		lg.warnf("%s", warning)
	}
	if lg.level = cfg.level; !cfg.enabled {
		lg.infof("the notification server is disabled in %s: enabled = false", cfg.file)
		return nil
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR1, syscall.SIGUSR2)
	ln, s := listen(cfg, getenv), newServer(cfg, lg, clk)
	metrics := ln // or its own port
	if cfg.metrics != "" {
		metrics, err = net.Listen("tcp", cfg.metrics)
		failIf(err != nil, "cannot serve metrics: %v: set metrics to an address of this machine with a port that is free", err)
		mux := http.NewServeMux()
		mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, strings.Join(s.figures(), "\n")) })
		go s.httpServer(mux).Serve(metrics)
	}
	lg.infof("started on %s; configuration: %s; group members are asked of %s; at most %d clients, by the limit of open files",
		ln.Addr(), cfg.source, cmp.Or(cfg.socket(), "seafile.sock, which is not there yet: "+strings.Join(cfg.sockets, ", ")), s.maxClients)
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(ln) }()
	sdNotify(getenv, "READY=1")
	watchdog, _ := strconv.Atoi(getenv("WATCHDOG_USEC"))
	gc, collections := debug.GCStats{}, int64(0)
	for tick, half := time.Tick(time.Second), time.Tick(time.Duration(watchdog)*time.Microsecond/2); ; { // nil for 0
		select {
		case <-tick:
			s.sweep()
			if debug.ReadGCStats(&gc); gc.NumGC > collections && time.Since(gc.LastGC) > 10*time.Second {
				debug.FreeOSMemory() // what a flood has left, Go alone gives back only after 2 minutes
				collections = gc.NumGC + 1
			}
		case <-half: // of the watchdog's time
			s.publish(&event{message: &message{}}, nil) // with figures takes the locks that each event takes: a stuck one ends this
			s.figures()
			sdNotify(getenv, "WATCHDOG=1")
		case err := <-served:
			return fmt.Errorf("cannot accept connections on %s any more: %w", ln.Addr(), err)
		case sig := <-signals:
			switch sig {
			case syscall.SIGUSR1:
				lg.reopen()
			case syscall.SIGUSR2:
				lg.infof("metrics: %s", strings.Join(slices.DeleteFunc(s.figures(), func(line string) bool { return line[0] == '#' }), " "))
			default:
				lg.infof("stopping on signal %q", sig)
				sdNotify(getenv, "STOPPING=1")
				metrics.Close()
				ln.Close()                         // frees the port
				time.Sleep(100 * time.Millisecond) // net/http drops requests that it has not read when it shuts down
				s.shutdown()
				lg.infof("stopped")
				return nil
			}
		}
	}
}

// listen takes the socket that systemd hands over (sd_listen_fds(3)), or opens the configured one.
func listen(cfg *config, getenv func(string) string) net.Listener {
	if n := getenv("LISTEN_FDS"); getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) && n != "0" {
		file := os.NewFile(3, "socket from systemd") // SD_LISTEN_FDS_START
		defer file.Close()                           // FileListener has its own copy
		ln, err := net.FileListener(file)
		failIf(err != nil || n != "1", "cannot serve what systemd handed over, %s sockets: %v: the .socket unit needs one ListenStream=, not more", n, cmp.Or(err, errors.New("only one can be served")))
		return ln
	}
	ln, err := (&net.ListenConfig{KeepAlive: -1}).Listen(context.Background(), "tcp", net.JoinHostPort(cfg.host, cfg.port)) // no probes: the server pings
	failIf(errors.Is(err, syscall.EADDRINUSE), "cannot listen: %v: another server, an earlier start of this one, or systemd holds the port: stop it first (pkill -f \"notification-server -c\", or systemctl stop notification-server.socket), or change port in %s", err, cfg.portAt)
	failIf(errors.Is(err, syscall.EADDRNOTAVAIL), "cannot listen: %v: this machine has no such address: set host to one of its own or to 0.0.0.0; in a cluster, start the server on that node only", err)
	failIf(err != nil, "cannot listen: %v: check host and port, and that this user may use them", err)
	return ln
}

// sdNotify tells systemd the state of the service (sd_notify(3)), if it asks.
func sdNotify(getenv func(string) string, state string) {
	if conn, err := net.Dial("unixgram", getenv("NOTIFY_SOCKET")); err == nil { // a leading @ means the abstract name space here, too
		conn.Write([]byte(state))
		conn.Close()
	}
}

// ---- Configuration ----

type config struct {
	file       string // of the settings, whether it is there or not
	source     string // which file and variables they come from, for the log
	enabled    bool
	host, port string
	portAt     string // where port was set: file:line, or a variable
	level      slog.Level
	key        []byte
	metrics    string   // HOST:PORT, or "" for none
	sockets    []string // where seafile.sock may be; the first that exists is asked
	warnings   []string // for the log, at each start
}

// loadConfig reads seafile.conf in the directory path, or path itself, and what the environment says in its place.
func loadConfig(path string, getenv func(string) string) *config {
	dir, cfg := path, &config{file: filepath.Join(path, "seafile.conf")}
	if info, err := os.Stat(path); err == nil && !info.IsDir() || err != nil && strings.HasSuffix(path, ".conf") {
		dir, cfg.file = filepath.Dir(path), path
	}
	_, err := os.Stat(dir)
	failIf(err != nil, "cannot read the configuration: %v: give the directory that holds seafile.conf with -c", err)
	data, err := os.ReadFile(cfg.file)
	cfg.source = cfg.file
	if errors.Is(err, os.ErrNotExist) && getenv("JWT_PRIVATE_KEY") != "" {
		cfg.source, err = "no file (there is no "+cfg.file+")", nil
	}
	failIf(err != nil, "cannot read the configuration: %v: it must be readable to this user, or missing and JWT_PRIVATE_KEY set in the environment", err)
	settings := parseConfig(cfg.file, string(data))
	get := func(key, variable string) setting {
		if value := getenv(variable); value != "" {
			cfg.source += ", " + variable
			return setting{value, "environment variable " + variable}
		}
		return settings[key]
	}
	warnIf := func(condition bool, at setting, text string) {
		if condition {
			cfg.warnings = append(cfg.warnings, at.where+": "+text)
		}
	}
	enabled := settings["enabled"]
	cfg.enabled, err = strconv.ParseBool(cmp.Or(strings.ToLower(enabled.value), "true"))
	failIf(err != nil, "%s: enabled must be true or false", enabled.where)
	cfg.host = cmp.Or(get("host", "NOTIFICATION_SERVER_HOST").value, "0.0.0.0")
	port := cmp.Or(get("port", "NOTIFICATION_SERVER_PORT"), setting{"8083", cfg.file})
	n, err := strconv.ParseUint(port.value, 10, 16)
	failIf(cfg.enabled && (err != nil || n == 0), "%s: port must be a number from 1 to 65535, not %q", port.where, port.value)
	cfg.port, cfg.portAt = port.value, port.where
	metrics := get("metrics", "NOTIFICATION_SERVER_METRICS")
	cfg.metrics = metrics.value
	_, _, err = net.SplitHostPort(cmp.Or(cfg.metrics, ":"))
	failIf(cfg.enabled && err != nil, "%s: metrics must be HOST:PORT, as in 127.0.0.1:9083, not %q", metrics.where, cfg.metrics)
	v := get("log_level", "NOTIFICATION_SERVER_LOG_LEVEL")
	level, known := levels[cmp.Or(strings.ToLower(v.value), "info")]
	cfg.level = level
	warnIf(!known, v, fmt.Sprintf("log_level %q is not known and means info; use debug, info, warning or error", v.value))
	key := get("jwt_private_key", "JWT_PRIVATE_KEY")
	cfg.key = []byte(key.value)
	const remedy = ": make one with \"openssl rand -base64 32\", the same for seaf-server, and restart Seafile"
	failIf(cfg.enabled && key.value == "", "%s: section [notification] has no jwt_private_key, nor has the environment JWT_PRIVATE_KEY%s", cfg.file, remedy)
	warnIf(key.value == "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F", key, "jwt_private_key is the one printed in Seafile's manual, with which anyone can forge events and read them"+remedy)
	warnIf(cfg.enabled && len(key.value) < 32, key, "jwt_private_key is shorter than 32 bytes and may be guessed"+remedy)
	if rpc := getenv("SEAFILE_RPC_PIPE_PATH"); rpc != "" {
		cfg.sockets = []string{filepath.Join(rpc, "seafile.sock")}
	}
	cfg.sockets = append(cfg.sockets, filepath.Join(dir, "../seafile-server-latest/runtime/seafile.sock"), filepath.Join(dir, "../seafile-data/seafile.sock"))
	return cfg
}

type setting struct{ value, where string } // where: file:line, or the name of a variable

// parseConfig returns the settings of section [notification]. An error does not show the line: it may be the key.
func parseConfig(file, data string) map[string]setting {
	settings, ours := map[string]setting{}, false
	for i, line := range strings.Split(strings.TrimPrefix(data, "\ufeff"), "\n") {
		line = strings.TrimSpace(line)
		where := fmt.Sprintf("%s:%d", file, i+1)
		switch key, value, found := strings.Cut(line, "="); {
		case line == "" || line[0] == '#' || line[0] == ';':
		case line[0] == '[':
			whole := line[len(line)-1] == ']'
			failIf(!whole && (ours || strings.HasPrefix(strings.TrimSpace(line[1:]), "notification")), "%s: a section header must end with its bracket, as in [notification], and nothing behind it", where)
			ours = whole && strings.TrimSpace(line[1:len(line)-1]) == "notification"
		case ours:
			failIf(!found || line[0] == '=', "%s: neither \"key = value\" nor a comment (a line that begins with # or ;): correct or remove it", where)
			settings[strings.TrimSpace(key)] = setting{strings.TrimSpace(value), where}
		}
	}
	return settings
}

func (cfg *config) socket() string {
	for _, path := range cfg.sockets {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

// ---- Tokens ----

// claims are what a token says. Each subscription has its own: one connection can carry several accounts.
type claims struct {
	Expires   *float64 `json:"exp"` // Unix time in seconds
	NotBefore float64  `json:"nbf"`
	RepoID    string   `json:"repo_id"`
	Username  string   `json:"username"`
	due       float64  // Unix time at which a subscriber is told that it runs out
}

func (s *server) unixSeconds() float64 { return float64(s.clock.wall().UnixMicro()) / 1e6 }

// verify returns the claims of a JSON Web Token (RFC 7515, 7519) signed with HS256; no other algorithm is ever tried.
func (s *server) verify(token string) (_ claims, err error) {
	defer catch(&err)
	parts := strings.Split(token, ".")
	refuseIf(len(parts) != 3 || strings.ContainsAny(token, "\r\n"), 401, "malformed", "the token is not three parts of base64url") // newlines the decoder skips
	var raw [3][]byte
	for i, part := range parts {
		raw[i], err = base64.RawURLEncoding.Strict().DecodeString(part)
		refuseIf(err != nil, 401, "malformed", "the token is not three parts of unpadded base64url")
	}
	var header map[string]any // whose names, unlike a struct's, match in this case only; all of Seafile's programs write {"alg":"HS256","typ":"JWT"}
	refuseIf(parts[0] != "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9" && (json.Unmarshal(raw[0], &header) != nil || header["alg"] != "HS256"), 401, "algorithm", "the token's header does not name HS256")
	mac := hmac.New(sha256.New, s.cfg.key)
	mac.Write([]byte(token[:strings.LastIndexByte(token, '.')]))
	refuseIf(!hmac.Equal(raw[2], mac.Sum(nil)), 401, "signature", "the token's signature does not match: jwt_private_key differs between here and seaf-server or Seahub, or one of them was not restarted since it changed")
	var c claims
	err = json.Unmarshal(raw[1], &c)
	refuseIf(err != nil || c.Expires == nil, 401, "malformed", "the token's claims are not an object with a number as exp: %v", err)
	now := s.unixSeconds()
	refuseIf(*c.Expires <= now-3600, 401, "long-expired", "the token expired more than an hour ago")
	refuseIf(*c.Expires <= now, 401, "expired", "the token expired %.0f s ago: if this goes on, the clocks of this machine and of seaf-server's differ", now-*c.Expires)
	refuseIf(c.NotBefore > now, 401, "not-yet", "the token is valid only in %.0f s: the clocks of this machine and of its maker's differ", c.NotBefore-now)
	return c, nil
}

// ---- The map of subscriptions ----

const (
	reservedFiles = 64                      // descriptors kept from clients, for events, /ping and the log
	repeatDelay   = 4 * time.Second         // a desktop client forgets an update 1.0–1.6 s after its download, and heeds it again after 3–6 s
	repeatWindow  = 30 * time.Second        // between two updates, within which the newer one may be forgotten
	pingAfter     = 20 * time.Second        // of silence; proxies cut at 50–60 s, browsers do not ping
	deadAfter     = 60 * time.Second        // without a frame
	idleLimit     = 2 * time.Minute         // without a subscription
	drainTime     = 2800 * time.Millisecond // over which clients are closed at the end, since all come back together
)

// A server holds everything. Its map from library to subscriptions is guarded by mu, which is held to look up and
// to queue, never to write: 10,000 subscribers take some ms. A conn's own lock may be taken under it, not the reverse.
type server struct {
	log        *logger
	cfg        *config
	clock      clock
	http       *http.Server
	maxClients int64
	clients    atomic.Int64 // WebSocket connections, and those about to be
	decoding   sync.Mutex   // held for a long message of a client
	metrics

	mu            sync.Mutex // guards all below, and the fields of conn and library that say so
	libraries     map[string]*library
	conns         map[*conn]bool
	batch         []*conn // with something to write, until flush
	subscriptions int
}

type library struct { // a repo with at least one subscription; guarded by server.mu
	id      string // the repo ID
	subs    map[*conn]*claims
	updated time.Duration // uptime at the newest update
	repeat  *message      // that update, if it is to be repeated
}

func newServer(cfg *config, lg *logger, clk clock) *server {
	var limit syscall.Rlimit // Go has raised the soft limit to the hard one before main
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	s := &server{
		log: lg, cfg: cfg, clock: clk, maxClients: max(int64(min(limit.Cur, 1<<22))-reservedFiles, 1), libraries: map[string]*library{}, conns: map[*conn]bool{},
		metrics: metrics{started: clk.wall(), counts: map[[2]string]int{}, quiet: map[string]time.Duration{}},
	}
	s.http = s.httpServer(s)
	return s
}

func (s *server) subscribe(c *conn, cl claims) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lib := s.libraries[cl.RepoID]
	if lib == nil {
		lib = &library{id: cl.RepoID, subs: map[*conn]*claims{}, updated: -repeatWindow}
		s.libraries[lib.id] = lib
	}
	if _, renewed := lib.subs[c]; !renewed {
		c.libraries = append(c.libraries, lib)
		s.subscriptions++
	}
	cl.due = max(*cl.Expires-10, min(*cl.Expires, s.unixSeconds()+50)) // told early, a client renews it in time, and misses nothing
	lib.subs[c], c.due = &cl, min(c.due, cl.due)
}

func (s *server) unsubscribe(c *conn, chosen func(*library) bool) { // mu must be held
	if len(c.libraries) > 0 {
		c.bare = s.clock.uptime() // what counts is the last time
	}
	c.due = math.Inf(1)
	c.libraries = slices.DeleteFunc(c.libraries, func(lib *library) bool {
		if !chosen(lib) {
			c.due = min(c.due, lib.subs[c].due)
			return false
		}
		if delete(lib.subs, c); len(lib.subs) == 0 {
			delete(s.libraries, lib.id)
		}
		s.subscriptions--
		return true
	})
}

// publish queues ev for the subscribers that it is for, and returns how many they are. Events queued one
// after the other arrive in that order everywhere. members are the users it is for, where it is for a group.
func (s *server) publish(ev *event, members map[string]bool) int {
	ev.accepted = s.clock.uptime()
	s.mu.Lock()
	defer s.flush()
	lib := cmp.Or(s.libraries[ev.repoID], &library{updated: -repeatWindow}) // nobody's
	if ev.replaces != "" {
		lib.repeat = nil
		if ev.accepted-lib.updated < repeatWindow {
			lib.repeat = ev.message
		}
		lib.updated = ev.accepted
	}
	return s.deliver(lib, ev.message, func(_ *conn, user string) bool {
		return (ev.user == "" || ev.user == user) && (members == nil || members[user])
	})
}

// deliver queues m for each live subscription of lib that is wanted, and returns how many took it. mu must be held.
func (s *server) deliver(lib *library, m *message, wanted func(c *conn, user string) bool) (n int) {
	now := s.unixSeconds()
	for c, cl := range lib.subs {
		if *cl.Expires > now && wanted(c, cl.Username) && s.queue(c, m) {
			n++
			if s.log.level == slog.LevelDebug {
				s.log.debugf("to %s, user %q: %q", c.name, cl.Username, m.text)
			}
		}
	}
	return n
}

// queue sends m to c, and reports whether it was taken. mu must be held, and then ended by flush.
func (s *server) queue(c *conn, m *message) bool {
	taken, idle := c.send(m)
	if idle {
		s.batch = append(s.batch, c)
	}
	if len(s.batch) == 256 { // is written while others are still queued: 15 % less time for 10,000
		go writeAll(s.batch...)
		s.batch = nil
	}
	return taken
}

// flush ends mu, and has all written to whom something was queued.
func (s *server) flush() {
	go writeAll(s.batch...)
	s.batch = nil
	s.mu.Unlock()
}

// sweep does each second what time brings about: it repeats updates, ends subscriptions, pings and closes.
func (s *server) sweep() {
	uptime, now := s.clock.uptime(), s.unixSeconds()
	s.mu.Lock()
	defer s.flush()
	for _, lib := range s.libraries {
		if lib.repeat != nil && uptime-lib.updated >= repeatDelay {
			again := *lib.repeat
			again.accepted = uptime
			s.deliver(lib, &again, func(c *conn, _ string) bool { return c.desktop })
			lib.repeat = nil
		}
	}
	for c := range s.conns {
		heard, writing := time.Duration(c.heard.Load()), time.Duration(c.writing.Load())
		switch {
		case writing > 0 && uptime-writing >= writeWait:
			c.abort("stalled")
		case uptime-heard >= deadAfter:
			s.queue(c, closing(statusPolicy, "silent", "no frame for 60 s"))
		case len(c.libraries) == 0 && uptime-c.bare >= idleLimit:
			s.queue(c, closing(statusPolicy, "idle", "no subscription for 2 minutes"))
		case uptime-max(heard, c.pinged) >= pingAfter:
			c.pinged = uptime
			s.queue(c, ping)
		}
		if c.due <= now {
			told := 0
			s.unsubscribe(c, func(lib *library) bool {
				cl, m := lib.subs[c], expired(lib.id)
				if cl.due > now || told == maxOutbox/2 { // all at once could fill the outbox
					return false
				}
				told++
				cl.due = *cl.Expires
				s.log.debugf("to %s, user %q: %q", c.name, cl.Username, m.text)
				s.queue(c, m)
				return *cl.Expires <= now
			})
		}
	}
}

// shutdown frees the port, then closes the clients, spread over drainTime, and waits for them: for 5 s in all.
func (s *server) shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), rpcWait+50*time.Millisecond)
	s.http.Shutdown(ctx) // waits for requests
	cancel()
	s.mu.Lock()
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	start, gap := time.Now(), min(time.Millisecond, drainTime/time.Duration(len(conns)+1))
	for i, c := range conns {
		time.Sleep(time.Until(start.Add(time.Duration(i) * gap)))
		c.tell(closing(statusGoingAway, "shutdown", "the server is restarted"))
	}
	for end := time.Now().Add(closeWait); s.clients.Load() > 0 && time.Now().Before(end); {
		time.Sleep(2 * time.Millisecond)
	}
}

// ---- A client's connection ----

const (
	subprotocol     = "notification.seafile.com" // offered by the desktop client, which fails on any other
	desktopBytes    = 4096                       // of a message, at most, are parsed by the desktop client
	maxMessageBytes = 1 << 20                    // of a client's message and of an event
	maxOutboxBytes  = maxMessageBytes + 10       // the largest event with its frame header always fits
	maxOutbox       = 1024                       // messages
	maxRefused      = 1000                       // subscriptions in a row, until the client is closed
	readBufferBytes = 512                        // per connection; a desktop client's subscribe takes 323 bytes
	writeWait       = 20 * time.Second           // without 16 KiB written, until a slow client is closed
	closeWait       = time.Second                // for the client's half of the closing handshake
	// Opcodes and close statuses of RFC 6455, sections 5.2 and 7.4.1, and of the IANA registry.
	opContinuation, opText, opBinary, opClose, opPing, opPong              = 0, 1, 2, 8, 9, 10
	statusNo, statusGoingAway, statusProtocol, statusInvalid, statusPolicy = 0, 1001, 1002, 1007, 1008
	statusTooBig, statusInternal, statusRestart, statusTryLater            = 1009, 1011, 1012, 1013
)

// A message is a frame on its way to one or many clients. Once queued it is not changed.
type message struct {
	frame    []byte
	text     []byte        // its payload, which is a part of it, for the log
	replaces string        // older messages with the same, still waiting in an outbox, are dropped for this one; "" none
	closes   string        // of a close frame: why, for the metrics
	accepted time.Duration // of an event: uptime, never 0
}

// newMessage makes one whole unmasked frame (RFC 6455, section 5.2).
func newMessage(opcode byte, payload []byte) *message {
	f := append(make([]byte, 0, len(payload)+10), 0x80|opcode)
	switch n := len(payload); {
	case n < 126:
		f = append(f, byte(n))
	case n < 1<<16:
		f = binary.BigEndian.AppendUint16(append(f, 126), uint16(n))
	default:
		f = binary.BigEndian.AppendUint64(append(f, 127), uint64(n))
	}
	f = append(f, payload...)
	return &message{frame: f, text: f[len(f)-len(payload):]}
}

var ping, pong = newMessage(opPing, nil), newMessage(opPong, nil)

func expired(repoID string) *message { // tells that the token for a library does not hold (any more)
	id, _ := json.Marshal(repoID)
	return newMessage(opText, fmt.Appendf(nil, `{"type":"jwt-expired","content":{"repo_id":%s}}`, id))
}

// closing ends a connection: why is for the metrics, text for the client. A control frame holds 125 bytes.
func closing(status int, why, text string) *message {
	var payload []byte
	if status != statusNo {
		payload = append(binary.BigEndian.AppendUint16(nil, uint16(status)), text[:min(len(text), 123)]...)
	}
	return &message{frame: newMessage(opClose, payload).frame, closes: why}
}

type incoming interface { // a frame, as x/net/websocket reads it
	io.Reader // of the payload, unmasked
	HeaderReader() io.Reader
	Len() int
}

type conn struct { // a client's WebSocket connection; what an event needs is together at its begin: 3 % less time for 10,000
	server         *server
	raw            syscall.RawConn
	desktop        bool          // speaks the subprotocol
	writing        atomic.Int64  // uptime since which a write waits, 0 if none does
	mu             sync.Mutex    // guards all down to closed; not held while writing
	outbox         []*message    // the first is being written
	one            [1]*message   // the outbox of one message, the common case
	bytes, written int           // in outbox; of its first
	closed         string        // why it is being closed
	nc             net.Conn      // of raw
	name           string        // its address, for the log
	heard          atomic.Int64  // uptime at the last frame
	br             *bufio.Reader // this and the next four are the goroutine's that reads
	next           func() (incoming, error)
	kind           byte          // the opcode of the message of which data is a part, or 0 between messages
	data           bytes.Buffer  // of its fragments so far
	refused        int           // subscriptions in a row
	libraries      []*library    // subscribed to; this and the next two are guarded by server.mu
	due            float64       // Unix time, the first of its subscriptions
	bare, pinged   time.Duration // uptime since which there is no subscription, and of our last ping
}

// send puts m into the outbox and reports whether it was taken, and whether c is idle: the caller must then see to
// its being written. A client that is too slow, or that cannot take m, is closed: it must not miss m unknowingly.
// Behind a close frame comes nothing.
func (c *conn) send(m *message) (taken, idle bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed != "" {
		return false, false
	}
	for i := len(c.outbox) - 1; i > 0 && m.replaces != ""; i-- { // the first is on its way
		if c.outbox[i].replaces == m.replaces {
			c.bytes -= len(c.outbox[i].frame)
			c.outbox = slices.Delete(c.outbox, i, i+1)
		}
	}
	taken = true
	if c.desktop && len(m.frame) > desktopBytes+4 { // with its header
		m, taken = closing(statusRestart, "too-long", "an event is too long for this client"), false
	} else if m.closes == "" && (len(c.outbox) >= maxOutbox || c.bytes+len(m.frame) > maxOutboxBytes) {
		c.outbox = c.outbox[:min(1, len(c.outbox))] // the first may be halfway out
		m, taken = closing(statusTryLater, "outbox-full", "too slow"), false
	}
	if m.closes != "" {
		c.closed = m.closes
		c.nc.SetReadDeadline(time.Now().Add(closeWait))
	}
	if idle = len(c.outbox) == 0; idle {
		c.outbox = c.one[:0]
		c.writing.Store(int64(c.server.clock.uptime()))
	}
	c.outbox = append(c.outbox, m)
	c.bytes += len(m.frame)
	return taken, idle
}

func (c *conn) tell(m *message) {
	if _, idle := c.send(m); idle {
		writeAll(c)
	}
}

// writeAll writes what the kernel has room for of the first message of connections that were idle. For the rest waits
// a goroutine of each, though not for ever (see sweep): no connection waits for another.
func writeAll(conns ...*conn) {
	var data []byte
	var n int
	try := func(fd uintptr) bool { n, _ = syscall.Write(int(fd), data); return true }
	for _, c := range conns {
		n, data = 0, c.one[0].frame
		c.raw.Write(try) // an error will show again
		if c.take(max(n, 0)) != nil {
			go c.drain()
		}
	}
}

func (c *conn) drain() {
	for data := c.take(0); data != nil; {
		n, err := c.nc.Write(data[:min(len(data), 16<<10)])
		if err != nil {
			c.abort("gone")
		}
		data = c.take(n)
	}
}

// take counts n more bytes of the outbox as written and returns what comes next, or nil.
func (c *conn) take(n int) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	uptime := c.server.clock.uptime()
	if c.written += n; len(c.outbox) > 0 && c.written == len(c.outbox[0].frame) {
		m := c.outbox[0]
		c.outbox, c.bytes, c.written = slices.Delete(c.outbox, 0, 1), c.bytes-len(m.frame), 0
		if m.accepted > 0 && m.closes == "" {
			c.server.delivered(uptime - m.accepted)
		}
		if half, ok := c.nc.(interface{ CloseWrite() error }); ok && m.closes != "" {
			half.CloseWrite() // the client sees the end; closing both ways, while it still sends, would reset and lose the frame
		}
	}
	if len(c.outbox) == 0 {
		c.outbox, c.one[0] = nil, nil
		c.writing.Store(0)
		return nil
	}
	c.writing.Store(int64(uptime))
	return c.outbox[0].frame[c.written:]
}

func (c *conn) abort(why string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nc.Close()
	c.outbox, c.closed = nil, cmp.Or(c.closed, why)
	return c.closed
}

// serve is the goroutine of c. It waits for frames, and answers the empty pings that a desktop client sends each
// second. All else is done by a goroutine that ends, since a grown stack shrinks late: so this one keeps 2 KiB, not 8.
func (c *conn) serve() {
	s, done := c.server, make(chan *message)
	for {
		head, err := c.br.Peek(2)
		if err != nil {
			break
		}
		if head[0] == 0x80|opPing && head[1] == 0x80 {
			c.br.Discard(6) // an error shows in the next Peek
			c.heard.Store(int64(s.clock.uptime()))
			c.tell(pong)
			continue
		}
		go func() { done <- c.guard(c.readFrame) }()
		if m := <-done; m != nil {
			c.tell(m)
			io.Copy(io.Discard, c.nc)                          // until the client ends it, or closeWait
			for i := 0; c.writing.Load() > 0 && i < 500; i++ { // it has ended its half before the frame was written
				time.Sleep(time.Millisecond)
			}
			break
		}
	}
	c.end(c.abort("gone"))
}

// end forgets c. Here no lock is held, should the log be stuck.
func (c *conn) end(why string) {
	s := c.server
	s.mu.Lock()
	s.unsubscribe(c, func(*library) bool { return true })
	delete(s.conns, c)
	s.mu.Unlock()
	s.clients.Add(-1)
	s.count("closed_total", why)
	if slow := map[string]string{"outbox-full": "its outbox is full", "stalled": "nothing could be written for 20s"}[why]; slow != "" {
		s.log.warnf("%s: closed, since %s: the client, or the network to it, is too slow", c.name, slow)
	}
	s.log.debugf("%s: disconnected: %s", c.name, why)
}

// guard returns what c is to be closed with, if f refuses what came from it. A panic in f ends c alone.
func (c *conn) guard(f func()) (m *message) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case *problem:
			c.server.log.debugf("%s: closed with %d %q", c.name, p.status, p.text)
			m = closing(p.status, p.reason, p.text)
		default:
			c.server.log.errorf("%s: closed, since its handler panicked: %q; please report this: %q", c.name, fmt.Sprint(p), debug.Stack())
			m = closing(statusInternal, "panic", "internal error")
		}
	}()
	f()
	return nil
}

// readFrame handles a frame. x/net/websocket parses and unmasks it, but checks nothing of RFC 6455, section 5: this does.
func (c *conn) readFrame() {
	endless := false // of the 64 bits of a length x/net/websocket drops the first, and half of them on a 32-bit machine
	if head, _ := c.br.Peek(2); len(head) == 2 && head[1]&0x7f == 127 {
		head, _ = c.br.Peek(10)
		endless = len(head) == 10 && binary.BigEndian.Uint64(head[2:]) > maxMessageBytes
	}
	f, err := c.next()
	refuseIf(err != nil, statusNo, "gone", "the client is gone")
	h, _ := io.ReadAll(f.HeaderReader())
	size := f.Len() - len(h)
	fin, opcode := h[0]&0x80 != 0, h[0]&0x0f
	payload, control := &c.data, opcode >= opClose
	if control {
		payload = &bytes.Buffer{}
	}
	refuseIf(h[0]&0x70 != 0, statusProtocol, "protocol", "reserved bits are set, but no extension was agreed on")
	refuseIf(opcode > opBinary && !control || opcode > opPong, statusProtocol, "protocol", "unknown opcode")
	refuseIf(h[1]&0x80 == 0, statusProtocol, "protocol", "a client must mask its frames")
	refuseIf(control && (!fin || size > 125 || endless), statusProtocol, "protocol", "a control frame is fragmented or longer than 125 bytes")
	refuseIf(!control && (opcode == opContinuation) != (c.kind != 0), statusProtocol, "protocol", "a fragment is out of place")
	refuseIf(endless || size > maxMessageBytes-payload.Len(), statusTooBig, "too-big", "a message is longer than 1 MiB")
	for n := size; n > 0 && err == nil; n -= 64 << 10 { // takes memory as the bytes come, not as the header promises
		if payload.Len() > maxMessageBytes/8 { // doubled, it could become 2 MiB
			payload.Grow(maxMessageBytes + bytes.MinRead - payload.Len())
		}
		_, err = io.CopyN(payload, f, int64(min(n, 64<<10)))
	}
	refuseIf(err != nil, statusNo, "gone", "the client is gone")
	c.heard.Store(int64(c.server.clock.uptime()))
	switch opcode {
	case opPing:
		c.tell(newMessage(opPong, payload.Bytes()))
	case opClose: // is answered with the client's own status
		p, status := payload.Bytes(), statusNo
		if len(p) > 1 {
			status = int(binary.BigEndian.Uint16(p))
			refuseIf(!utf8.Valid(p[2:]), statusInvalid, "protocol", "the reason of a close frame is not UTF-8")
		}
		bad := status < 1000 || status >= 1004 && status <= 1006 || status > 1014 && status < 3000 || status > 4999
		refuseIf(bad && len(p) > 0, statusProtocol, "protocol", "a close status that must not be sent")
		refuseIf(true, status, "client", "")
	case opText, opBinary:
		c.kind = opcode
	}
	if control || !fin {
		return
	}
	data := c.data.Bytes()
	refuseIf(c.kind == opText && !utf8.Valid(data), statusInvalid, "protocol", "a text message is not UTF-8")
	c.data, c.kind = bytes.Buffer{}, 0
	c.handle(data)
}

func (c *conn) handle(data []byte) {
	type repo struct {
		ID    string
		Token string `json:"jwt_token"`
	}
	var m struct {
		Type    string
		Content struct{ Repos []repo }
	}
	s := c.server
	if len(data) > 16<<10 { // decoded, it can take 22 times as much: so only one at a time
		s.decoding.Lock()
		defer s.decoding.Unlock()
	}
	err := json.Unmarshal(data, &m)
	bad := func(condition bool, text string) { refuseIf(condition, statusPolicy, "bad-message", "%s", text) }
	bad(err != nil, fmt.Sprintf("not a message: %+.60q", err))
	bad(m.Type != "subscribe" && m.Type != "unsubscribe", fmt.Sprintf("unknown type %+.60q: subscribe or unsubscribe", m.Type))
	bad(m.Content.Repos == nil || slices.ContainsFunc(m.Content.Repos, func(r repo) bool { return r.ID == "" }), `"content" must be {"repos":[{"id":...}]}`)
	for _, repo := range m.Content.Repos {
		if m.Type == "unsubscribe" {
			s.mu.Lock()
			s.unsubscribe(c, func(lib *library) bool { return lib.id == repo.ID })
			s.mu.Unlock()
			s.log.debugf("%s: unsubscribed from %q", c.name, repo.ID)
			continue
		}
		cl, err := s.verify(repo.Token)
		if err == nil && cl.RepoID != repo.ID {
			err = &problem{403, "other-library", "the token is for another library"}
		}
		if err == nil {
			c.refused = 0
			s.subscribe(c, cl)
			s.log.debugf("%s: subscribed to %q, user %q", c.name, repo.ID, cl.Username)
			continue
		}
		s.refused("a subscription", c.name, err.(*problem))
		if c.refused++; c.refused >= maxRefused {
			s.log.warnf("%s: closed after %d refused subscriptions in a row; the last one: %v", c.name, c.refused, err)
			refuseIf(true, statusPolicy, "refused", "too many refused subscriptions")
		}
		s.log.debugf("to %s: %q", c.name, expired(repo.ID).text)
		c.tell(expired(repo.ID))
	}
}

// ---- The HTTP handlers ----

// httpServer cuts off who is slow. Idle connections stay longer than in the senders' pools: 90 s (Go), 118 s (libcurl).
func (s *server) httpServer(handler http.Handler) *http.Server {
	return &http.Server{Handler: handler, MaxHeaderBytes: 16 << 10, DisableGeneralOptionsHandler: true, ErrorLog: log.New(s.log, "", 0),
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 20 * time.Second, WriteTimeout: 20 * time.Second, IdleTimeout: 3 * time.Minute}
}

// ServeHTTP ignores repeated and trailing slashes and a leading /notification: each proxy rule in use leaves others.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.Join(strings.FieldsFunc(r.URL.Path, func(c rune) bool { return c == '/' }), "/") + "/"
	path = strings.TrimSuffix(strings.TrimPrefix(path, "notification/"), "/")
	allow := map[string]string{"": "GET, HEAD", "ping": "GET, HEAD", "events": "POST"}[path]
	err := func() (err error) {
		defer catch(&err)
		refuseIf(allow == "", 404, "not-found", "not found: the notification server answers /, /ping and /events")
		refuseIf(!slices.Contains(strings.Split(allow, ", "), r.Method), 405, "bad-method", "the method must be %s", allow)
		w.Header().Set("Content-Type", "application/json")
		switch path {
		case "ping":
			io.WriteString(w, `{"ret": "pong"}`+"\n")
		case "events":
			fmt.Fprintf(w, `{"subscribers":%d}`+"\n", s.serveEvent(w, r))
		default:
			s.serveWebSocket(w, r)
		}
		return nil
	}()
	if err != nil {
		p := err.(*problem)
		s.refused("a request", peer(r), p)
		maps.Copy(w.Header(), map[int]http.Header{
			401: {"Www-Authenticate": {"Token"}},
			405: {"Allow": {allow}},
			426: {"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-Websocket-Version": {"13"}},
			503: {"Retry-After": {"60"}, "Connection": {"close"}}, // or those who were refused took the reserved descriptors
		}[p.status])
		http.Error(w, p.text, p.status)
	}
}

func peer(r *http.Request) string { // gives a client's address, and what a proxy says of it, for the log
	if forwarded := r.Header.Values("X-Forwarded-For"); forwarded != nil { // HAProxy adds a line
		return fmt.Sprintf("%s for %.100q", r.RemoteAddr, strings.Join(forwarded, ", "))
	}
	return r.RemoteAddr
}

func (s *server) refused(what, from string, p *problem) { // counts it, and logs it once a minute for each reason
	uptime := s.clock.uptime()
	s.counting.Lock()
	s.counts[[2]string{"refused_total", p.reason}]++
	quiet := uptime < s.quiet[p.reason] && p.reason != "group-members" // each of these ends connections
	if !quiet {
		s.quiet[p.reason] = uptime + time.Minute
	}
	s.counting.Unlock() // before a write that may not end
	if !quiet {
		s.log.warnf("%s from %s refused: %s", what, from, p.text)
	}
}

// serveEvent returns as soon as the event is queued, since the Go file server makes a user's upload wait for the answer.
func (s *server) serveEvent(w http.ResponseWriter, r *http.Request) (subscribers int) {
	token, found := strings.CutPrefix(r.Header.Get("Authorization"), "Token ")
	if !found {
		token = r.Header.Get("Seafile-Repo-Token") // of Seafile 10
	}
	refuseIf(token == "", 401, "no-token", "there is no token in Authorization: Token or in Seafile-Repo-Token")
	cl, err := s.verify(strings.TrimSpace(token))
	if err != nil {
		panic(err)
	}
	refuseIf(cl.Username != "", 403, "client-token", "a client's token is good for subscriptions, not for events")
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxMessageBytes))
	refuseIf(errors.As(err, new(*http.MaxBytesError)), 413, "too-big", "the event is longer than 1 MiB")
	refuseIf(err != nil, 400, "bad-event", "the event did not come in whole: %v", err)
	ev := parseEvent(body)
	refuseIf(cl.RepoID != "" && cl.RepoID != ev.repoID, 403, "other-library", "the token is for another library")
	s.count("events_total", ev.kind)
	if ev.group == nil {
		return s.publish(ev, nil)
	}
	members, err := s.cfg.askMembers(*ev.group)
	if err != nil { // neither leak nor loss: nobody gets it, and all ask anew
		s.count("group_lookups_total", "failed")
		n := s.publish(&event{repoID: ev.repoID, message: closing(statusRestart, "resync", "group members are not known")}, nil)
		refuseIf(true, 503, "group-members", "the members of group %d are not known, so nobody gets this event, and %d subscribers of library %q resync: %v", *ev.group, n, ev.repoID, err)
	}
	s.count("group_lookups_total", "ok")
	return s.publish(ev, members)
}

type event struct {
	*message     // {"type","content"} in compact JSON
	kind, repoID string
	user         string // the only one it is for, or "" for all
	group        *int64 // the only one it is for
}

func parseEvent(body []byte) *event { // or refuses it
	bad := func(condition bool, format string, args ...any) {
		refuseIf(condition, 400, "bad-event", format, args...)
	}
	var outer struct {
		Type    string
		Content json.RawMessage
	}
	var content struct {
		RepoID     string `json:"repo_id"`
		Type, User string
		Group      *int64
	}
	err := json.Unmarshal(body, &outer)
	bad(err != nil, "the event is not one JSON object: %v", err)
	bad(!slices.Contains([]string{"repo-update", "file-lock-changed", "folder-perm-changed", "comment-update"}, outer.Type), "unknown type %.100q", outer.Type)
	err = json.Unmarshal(outer.Content, &content) // an error shows in the fields
	bad(content.RepoID == "", "the content is not an object with a repo_id that is a string and not empty")
	bad(!utf8.Valid(body), "the event is not UTF-8")
	text := bytes.NewBufferString(`{"type":"` + outer.Type + `","content":`)
	json.Compact(text, outer.Content)
	text.WriteByte('}')
	ev := &event{message: newMessage(opText, text.Bytes()), kind: outer.Type, repoID: content.RepoID}
	switch ev.kind {
	case "repo-update":
		ev.replaces = ev.repoID // only the newest commit matters
	case "folder-perm-changed":
		if content.Group != nil && *content.Group == -1 || content.Type == "user" { // -1 is seaf-server's way of saying none
			content.Group = nil
		}
		if content.Type == "group" {
			content.User = ""
		}
		bad(err != nil || (content.User == "") == (content.Group == nil) || !slices.Contains([]string{"user", "group", ""}, content.Type),
			"a folder-perm-changed needs the type user and a user, or the type group and the number of a group")
		ev.user, ev.group = content.User, content.Group
	}
	return ev
}

// serveWebSocket checks no Origin: behind a proxy each real client's differs from the Host, and the token protects.
func (s *server) serveWebSocket(w http.ResponseWriter, r *http.Request) {
	has := func(field, word string) bool {
		list := strings.Split(strings.Join(r.Header.Values(field), ","), ",")
		return slices.ContainsFunc(list, func(v string) bool { return strings.EqualFold(strings.TrimSpace(v), word) })
	}
	refuseIf(!has("Connection", "upgrade") || !has("Upgrade", "websocket"), 426, "no-websocket", "This is Seafile's notification server. Its clients connect here by WebSocket; this request does not. To check that it works, ask for /ping, or run notification-server -c DIR -check URL. If a client got this, its proxy does not pass on the headers Upgrade and Connection.")
	refuseIf(!r.ProtoAtLeast(1, 1) || r.Method != "GET", 426, "no-websocket", "A WebSocket needs GET and HTTP/1.1, but this request came by %s and %s: set proxy_http_version 1.1 in nginx.", r.Method, r.Proto)
	refuseIf(r.Header.Get("Sec-WebSocket-Version") != "13", 426, "no-websocket", "Sec-WebSocket-Version must be 13")
	key, err := base64.StdEncoding.DecodeString(r.Header.Get("Sec-WebSocket-Key"))
	refuseIf(err != nil || len(key) != 16, 400, "no-websocket", "Sec-WebSocket-Key must be 16 bytes in base64")
	if s.clients.Add(1) > s.maxClients {
		s.clients.Add(-1)
		refuseIf(true, 503, "full", "%d clients are connected; the limit of open files allows no more: raise it (ulimit -n, LimitNOFILE=)", s.maxClients)
	}
	c := &conn{server: s, name: peer(r), desktop: has("Sec-WebSocket-Protocol", subprotocol), bare: s.clock.uptime(), due: math.Inf(1)}
	c.heard.Store(int64(c.bare))
	r.Header["Connection"], r.Header["Upgrade"] = []string{"upgrade"}, []string{"websocket"} // x/net/websocket looks at one line of each only
	r.Host = "localhost"                                                                     // whatever the client says: x/net/websocket would answer a bad one by itself
	r.Header["Sec-Websocket-Protocol"] = map[bool][]string{true: {subprotocol}}[c.desktop]   // which is answered; no other is
	websocket.Server{
		Handshake: func(*websocket.Config, *http.Request) error { return nil },
		Handler: func(ws *websocket.Conn) {
			next := ws.NewFrameReader // all that is kept of ws: the request and the buffer for writing are free now
			c.next = func() (incoming, error) { return next() }
			c.nc.SetWriteDeadline(time.Time{})
			s.log.debugf("%s: connected", c.name)
			s.mu.Lock()
			s.conns[c] = true
			s.mu.Unlock()
			go c.serve()
		},
	}.ServeHTTP(hijacker{w, c}, r)
	if c.next == nil { // the handshake failed
		s.clients.Add(-1)
		c.nc.Close()
	}
}

// A hijacker gives x/net/websocket a small buffer in place of net/http's of 4 KiB, and keeps the connection open.
type hijacker struct {
	http.ResponseWriter
	c *conn
}

type unclosed struct{ net.Conn } // by x/net/websocket
func (unclosed) Close() error    { return nil }

func (h hijacker) Hijack() (nc net.Conn, rw *bufio.ReadWriter, err error) {
	if nc, rw, err = h.ResponseWriter.(http.Hijacker).Hijack(); err != nil {
		return nil, nil, err
	}
	h.c.nc, h.c.br = nc, bufio.NewReaderSize(nc, readBufferBytes)
	if rw.Reader.Buffered() > 0 { // what came right behind the handshake
		h.c.br = rw.Reader
	}
	nc.SetWriteDeadline(time.Now().Add(writeWait))                       // for the answer to the upgrade
	nc.(interface{ SetWriteBuffer(int) error }).SetWriteBuffer(64 << 10) // with Linux's 4 MiB a slow reader looks like a stuck one
	h.c.raw, err = nc.(syscall.Conn).SyscallConn()
	return unclosed{nc}, bufio.NewReadWriter(h.c.br, rw.Writer), err
}

// ---- Group members ----

const (
	rpcWait       = 800 * time.Millisecond // seaf-server, when it posts an event, waits 1 s
	maxReplyBytes = 8 << 20                // some 80,000 members
)

var errUnknownGroup = errors.New("seaf-server does not know them: the group is gone or empty, or seaf-server's database is down")

// askMembers asks seaf-server for the users in a group, over its Unix socket. An error means that they are not known.
func (cfg *config) askMembers(group int64) (members map[string]bool, err error) {
	defer catch(&err)
	socket, deadline := cfg.socket(), time.Now().Add(rpcWait)
	failIf(socket == "", "there is no %s: start seaf-server, or set SEAFILE_RPC_PIPE_PATH to the directory of its seafile.sock", strings.Join(cfg.sockets, ", nor "))
	nc, err := net.DialTimeout("unix", socket, rpcWait)
	failIf(err != nil, "cannot ask seaf-server: %v: is it running, and may this user open its socket?", err)
	defer nc.Close()
	nc.SetDeadline(deadline)
	request := fmt.Appendf(make([]byte, 4), `{"service":"seafserv-threaded-rpcserver","request":"[\"get_group_members\", %d, -1, -1]"}`, group)
	binary.LittleEndian.PutUint32(request, uint32(len(request)-4))
	nc.Write(request) // an error shows in reading
	members, err = readMembers(nc)
	failIf(err != nil && err != errUnknownGroup, "asked on %s: %v", socket, err)
	return members, err
}

// readMembers reads the reply: a little-endian length of 4 bytes, then JSON.
func readMembers(r io.Reader) (_ map[string]bool, err error) {
	defer catch(&err)
	var reply struct {
		Ret []struct {
			Name string `json:"user-name"`
		}
		Code int    `json:"err_code"`
		Text string `json:"err_msg"`
	}
	var size uint32
	headless := binary.Read(r, binary.LittleEndian, &size)
	failIf(size > maxReplyBytes, "seaf-server's answer cannot have %d bytes", size)
	data := make([]byte, size)
	err = cmp.Or(headless, binary.Read(r, binary.LittleEndian, data), json.Unmarshal(data, &reply)) // a short read is an error
	failIf(err != nil, "seaf-server does not answer as it should: %v", err)
	failIf(reply.Code != 0 || reply.Text != "", "seaf-server answers with error %d, %q", reply.Code, reply.Text)
	if reply.Ret == nil { // null means not known, never nobody
		return nil, errUnknownGroup
	}
	members := make(map[string]bool, len(reply.Ret))
	for _, user := range reply.Ret {
		failIf(user.Name == "", "seaf-server names a member without a user-name")
		members[user.Name] = true
	}
	return members, nil
}

// ---- Self-check ----

// runCheck does what seaf-server and a client do, prints a line for each step, and returns the exit status.
func runCheck(dir string, urls []string, getenv func(string) string, stdout io.Writer) (status int) {
	log.SetOutput(io.Discard)               // net/http's remarks on a service that speaks no HTTP
	end := time.Now().Add(14 * time.Second) // group members are asked in less than 1 s more
	ctx, cancel := context.WithDeadline(context.Background(), end)
	defer cancel()
	done := map[string]bool{"": true}
	step := func(name, needs string, try func() string) {
		mark, text, err := "-", "not tried, since a step before it failed", error(nil)
		if done[needs] {
			mark = "✓"
			func() { defer catch(&err); text = try() }()
		}
		if err != nil {
			mark, text, status = "✗", err.Error(), 1
		}
		done[name] = mark == "✓"
		fmt.Fprintf(stdout, "%s %s: %s\n", mark, name, text)
	}
	var cfg *config
	var own, events string // the URLs of the server that cfg describes, and to which seaf-server posts
	var sessions []*websocket.Conn
	var took time.Duration
	id := rand.Text() // of a library: random, so that no real client is disturbed
	step("configuration", "", func() string {
		cfg = loadConfig(dir, getenv)
		failIf(!cfg.enabled, "%s says enabled = false: the server does not run", cfg.file)
		own = "http://" + net.JoinHostPort(strings.Replace(cfg.host, "0.0.0.0", "127.0.0.1", 1), cfg.port)
		events = strings.TrimRight(cmp.Or(getenv("INNER_NOTIFICATION_SERVER_URL"), own), "/") + "/events"
		if len(urls) == 0 {
			urls = []string{own}
		}
		return strings.Join(append([]string{cfg.source}, cfg.warnings...), "; WARNING: ")
	})
	step("ping", "configuration", func() string {
		for _, url := range urls {
			url = strings.TrimRight(url, "/") + "/ping"
			answer, text := ask(ctx, own, "GET", url, "", nil)
			failIf(answer.StatusCode == 400 && strings.Contains(text, "HTTPS"), "%s answers 400, since that port speaks TLS: give the URL with https://", url)
			failIf(answer.StatusCode == 401 || answer.StatusCode == 403, "%s answers %d: the proxy asks for a password, or blocks it: clients have none to give for /notification", url, answer.StatusCode)
			failIf(strings.Contains(text, "<html"), "%s answers %d with a web page: Seahub or another service answers: the proxy's rule for /notification is missing, or stands behind the one for /", url, answer.StatusCode)
			failIf(!strings.Contains(text, `"pong"`), "%s answers %d, but not pong: another service listens there: correct host and port, here or in the proxy's rule", url, answer.StatusCode)
			date, err := http.ParseTime(answer.Header.Get("Date"))
			failIf(err == nil && time.Since(date).Abs() >= time.Minute, "%s answers pong, but its clock differs from this machine's by %v, and tokens run out by it: set both by NTP", url, time.Since(date).Round(time.Second))
		}
		return strings.Join(urls, "/ping, ") + "/ping answers pong"
	})
	step("upgrade", "ping", func() string {
		for _, url := range urls {
			for _, as := range [][3]string{{"the desktop client", "Sec-Websocket-Protocol", subprotocol}, {"a browser", "Origin", "https://cloud.example.com"}} {
				answer, _ := ask(ctx, own, "GET", url, "", http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"},
					"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {base64.StdEncoding.EncodeToString([]byte(id[:16]))}, as[1]: {as[2]}})
				failIf(answer.StatusCode != 101, "as %s: %s answers %d, not 101: the proxy must pass on the headers Upgrade and Connection, by HTTP/1.1", as[0], url, answer.StatusCode)
			}
		}
		return "goes through, for the desktop client and for a browser"
	})
	token := func(username string) string { // signed as by seaf-server
		enc := base64.RawURLEncoding
		claims := fmt.Appendf(nil, `{"exp":%d,"repo_id":%q,"username":%q}`, time.Now().Add(5*time.Minute).Unix(), id, username)
		text := enc.EncodeToString([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + enc.EncodeToString(claims)
		mac := hmac.New(sha256.New, cfg.key)
		mac.Write([]byte(text))
		return text + "." + enc.EncodeToString(mac.Sum(nil))
	}
	receive := func(ws *websocket.Conn) (text string) {
		ws.SetReadDeadline(time.Now().Add(min(answerTime, time.Until(end))))
		websocket.Message.Receive(ws, &text)
		return text
	}
	subscribe := func(ws *websocket.Conn) string { // the answer is to the broken one, since a good subscription has none
		fmt.Fprintf(ws, `{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q},{"id":"broken","jwt_token":"x.y.z"}]}}`, id, token("check@example.com"))
		return receive(ws)
	}
	step("subscription", "upgrade", func() string {
		for _, url := range urls {
			config, _ := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), url) // ask has parsed it
			ws, err := config.DialContext(ctx)
			failIf(err != nil, "%s: %v: no WebSocket in time, though an upgrade went through before: see the server's log", url, err)
			ws.SetWriteDeadline(end)
			sessions = append(sessions, ws)
			answer := subscribe(ws)
			failIf(!strings.Contains(answer, "jwt-expired"), "%s answers %.60q to a broken token, not jwt-expired: another service listens there: correct host and port, here or in the proxy's rule", url, answer)
			failIf(strings.Contains(answer, id), "%s refuses a token signed with this key: the running server has another jwt_private_key (restart Seafile, so that all its programs read the same one), or its clock is ahead by minutes: see its log", url)
		}
		return "a good token is accepted, a broken one is answered jwt-expired"
	})
	post := func(username string, want int) {
		body := fmt.Sprintf(`{"type":"repo-update","content":{"repo_id":%q,"commit_id":"check"}}`, id)
		answer, text := ask(ctx, own, "POST", events, body, http.Header{"Authorization": {"Token " + token(username)}})
		failIf(answer.StatusCode == 401, "%s answers 401: %.300q", events, text)
		failIf(want != 200 && strings.Contains(text, "pong"), "%s: the first server of the cluster, which decides on events, is down, and another answered in its place: start it", events)
		failIf(answer.StatusCode != want, "%s answers %d to this event, not %d: another service, or the server that Seafile ships, listens there", events, answer.StatusCode, want)
	}
	step("event", "subscription", func() string {
		start := time.Now()
		post("", 200)
		for i, ws := range sessions {
			failIf(!strings.Contains(receive(ws), id), "posted to %s and answered 200, but it did not come back over %s: they lead to different servers (in a cluster: nginx does not mirror events to it)", events, urls[i])
		}
		took = time.Since(start).Round(100 * time.Microsecond)
		return fmt.Sprintf("posted to %s, it arrived after %v", events, took)
	})
	step("forgery", "ping", func() string {
		post("check@example.com", 403)
		return "an event posted with a client's token is refused"
	})
	step("group members", "configuration", func() string {
		if _, err := cfg.askMembers(1); err != nil && !errors.Is(err, errUnknownGroup) {
			return fmt.Sprintf("note: %v. Until then, when a folder's permission changes for a group, the library's clients reconnect and ask for everything anew", err)
		}
		return "seaf-server answers on " + cfg.socket()
	})
	step("connection", "event", func() string {
		for i, ws := range sessions {
			if w, err := ws.NewFrameWriter(websocket.PingFrame); err == nil {
				w.Write([]byte("check"))
			}
			answer := subscribe(ws)
			failIf(strings.Contains(answer, id), "%s: the event came twice, or a forged one came: nginx mirrors it twice to this server, or it is not this server", urls[i])
			failIf(!strings.Contains(answer, "broken"), "%s: no answer behind a ping: the proxy closes connections early", urls[i])
			ws.Close()
		}
		return "still there after a ping"
	})
	fmt.Fprintln(stdout, [...]string{fmt.Sprintf("It works: a notification takes %v.", took), "It does not work: the first cross says why."}[status])
	return status
}

const answerTime = 4 * time.Second // for one answer to ask or subscribe

// ask sends a request, and says why there is no answer, or one that can only be a proxy's own.
func ask(ctx context.Context, own, method, url, body string, header http.Header) (*http.Response, string) {
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	failIf(err != nil || r.URL.Host == "" || !strings.HasPrefix(url, "http"), "%q is no URL as https://cloud.example.com/notification", url)
	r.Header = header
	transport := &http.Transport{TLSClientConfig: &tls.Config{}} // no proxy of the environment's, and HTTP/1.1
	answer, err := (&http.Client{Timeout: answerTime, Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}).Do(r)
	var invalid x509.CertificateInvalidError
	failIf(errors.As(err, new(*net.DNSError)), "%v: DNS has no address for the name: check its spelling, and DNS", err)
	failIf(errors.Is(err, syscall.ECONNREFUSED), "%v: nothing listens there: start the notification server (or the proxy), or correct host and port", err)
	failIf(errors.As(err, &invalid) && invalid.Reason == x509.Expired, "%v: renew the proxy's certificate, and check this machine's clock", err)
	failIf(errors.As(err, new(*tls.CertificateVerificationError)), "%v: the certificate is not trusted: let the proxy send the whole chain, for this name, of an authority that clients know", err)
	failIf(ctx.Err() != nil, "%v: the steps together took 14 s, and no more are waited for", err)
	failIf(os.IsTimeout(err), "%v: no answer in %v: look for a firewall between", err, answerTime)
	failIf(err != nil, "%v: no way leads there, another service listens there, the proxy does not serve this name, or it is https for http, or the reverse", err)
	defer answer.Body.Close()
	status := answer.StatusCode
	if to, err := answer.Location(); err == nil && status > 300 {
		failIf(strings.TrimRight(to.Path, "/") != strings.TrimRight(r.URL.Path, "/"), "%s redirects to %s, a web page: Seahub or another service answers: the proxy's rule for /notification is missing, or stands behind the one for /", url, to)
		failIf(to.Path != r.URL.Path, "%s redirects to %s, but clients do not follow: write the proxy's rule for /notification without a slash at its end", url, to)
		failIf(true, "%s redirects to %s, but clients do not follow: give %s here, to the clients or in INNER_NOTIFICATION_SERVER_URL", url, to, strings.TrimSuffix(strings.TrimSuffix(to.String(), "/ping"), "/events"))
	}
	failIf(status == 404, "%s answers 404: the proxy's rule for /notification is missing or does not match, the URL lacks /notification, or another service listens there", url)
	failIf(status >= 502, "%s answers %d: the proxy cannot reach the notification server, which it must find at its host and port (by this configuration %s), or that has no room for more clients (see its log)", url, status, own)
	if status == 101 {
		return answer, ""
	}
	text, _ := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
	return answer, string(text)
}

// ---- Logging and metrics ----

var levels = map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "warn": slog.LevelWarn, "error": slog.LevelError}

// A logger writes lines that Seafile's log tools read. What comes from outside is quoted by the caller.
type logger struct {
	path   string // "-" for none
	level  slog.Level
	prefix string
	stderr io.Writer
	mu     sync.Mutex
	out    io.Writer
	broken bool // and said so
}

func openLog(path string, toStdout bool, stdout, stderr io.Writer) *logger {
	lg := &logger{path: path, out: stderr, stderr: stderr}
	if toStdout {
		lg.path, lg.out, lg.prefix = "-", stdout, "[notification-server] "
	}
	lg.reopen()
	return lg
}

func (lg *logger) reopen() { // where that fails the log goes where it went
	if lg.path == "-" {
		return
	}
	lg.mu.Lock()
	defer lg.mu.Unlock()
	file, err := os.OpenFile(lg.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	if err != nil {
		fmt.Fprintf(lg.stderr, "notification-server: cannot open the log: %v: serving goes on; correct it, then send SIGUSR1\n", err)
		return
	}
	if old, ok := lg.out.(*os.File); ok && lg.out != lg.stderr {
		old.Close()
	}
	lg.out = file
}

func (lg *logger) debugf(format string, args ...any) { lg.printf(slog.LevelDebug, format, args...) }
func (lg *logger) infof(format string, args ...any)  { lg.printf(slog.LevelInfo, format, args...) }
func (lg *logger) warnf(format string, args ...any)  { lg.printf(slog.LevelWarn, format, args...) }
func (lg *logger) errorf(format string, args ...any) { lg.printf(slog.LevelError, format, args...) }

func (lg *logger) printf(level slog.Level, format string, args ...any) {
	if level < lg.level {
		return
	}
	name := strings.Replace(level.String(), "WARN", "WARNING", 1)
	text := fmt.Sprintf("%s[%s] [%s] %s\n", lg.prefix, time.Now().Format(time.DateTime), name, fmt.Sprintf(format, args...))
	lg.mu.Lock()
	defer lg.mu.Unlock()
	_, err := io.WriteString(lg.out, text)
	if err != nil && !lg.broken {
		fmt.Fprintf(lg.stderr, "notification-server: cannot write the log: %v: serving goes on; make room, or correct it and send SIGUSR1\n", err)
	}
	lg.broken = err != nil
}

func (lg *logger) Write(p []byte) (int, error) {
	lg.warnf("%q", bytes.TrimSpace(p)) // what net/http has to say
	return len(p), nil
}

type metrics struct {
	started  time.Time
	counting sync.Mutex               // guards all below
	counts   map[[2]string]int        // by name and value of the label
	buckets  [len(bounds) + 1]int     // deliveries by the time they took
	seconds  float64                  // of all deliveries
	quiet    map[string]time.Duration // uptime until which refusals for a reason are not logged
}

var bounds = [...]float64{.001, .005, .01, .05, .1, .5, 1, 5, 30} // of the buckets of delivery_seconds

func (m *metrics) count(name, label string) {
	m.counting.Lock()
	m.counts[[2]string{name, label}]++
	m.counting.Unlock()
}

func (m *metrics) delivered(d time.Duration) { // d after the event was accepted
	m.counting.Lock()
	i, _ := slices.BinarySearch(bounds[:], d.Seconds())
	m.buckets[i]++
	m.seconds += d.Seconds()
	m.counting.Unlock()
}

func (s *server) figures() (lines []string) { // of the metrics, in Prometheus' text format
	family := func(name, kind, help string, samples ...any) { // the rest of the name, and the value, of each
		lines = append(lines, "# HELP "+name+" "+help, "# TYPE "+name+" "+kind)
		for i := 0; i < len(samples); i += 2 {
			lines = append(lines, fmt.Sprint(name, samples[i], " ", samples[i+1]))
		}
	}
	var pages, resident, deliveries int
	statm, _ := os.ReadFile("/proc/self/statm")
	fmt.Sscan(string(statm), &pages, &resident)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counting.Lock()
	defer s.counting.Unlock()
	family("seafile_notification_connections", "gauge", "Clients connected by WebSocket.", "", len(s.conns))
	family("seafile_notification_subscriptions", "gauge", "Subscriptions of clients to libraries.", "", s.subscriptions)
	family("seafile_notification_libraries", "gauge", "Libraries with at least one subscription.", "", len(s.libraries))
	for _, c := range [][3]string{
		{"events_total", "type", "Events accepted."},
		{"refused_total", "reason", "Events, subscriptions and clients refused."},
		{"closed_total", "reason", "Connections ended."},
		{"group_lookups_total", "result", "Questions for the members of a group."},
	} {
		var samples []any
		for key, n := range s.counts {
			if key[0] == c[0] {
				samples = append(samples, fmt.Sprintf("{%s=%q}", c[1], key[1]), n)
			}
		}
		family("seafile_notification_"+c[0], "counter", c[2], samples...)
	}
	var samples []any
	for i, n := range s.buckets {
		deliveries += n
		samples = append(samples, fmt.Sprintf("_bucket{le=%q}", fmt.Sprint(append(bounds[:], math.Inf(1))[i])), deliveries)
	}
	samples = append(samples, "_sum", s.seconds, "_count", deliveries)
	family("seafile_notification_delivery_seconds", "histogram", "Time from accepting an event to having written it to a client.", samples...)
	family("seafile_notification_deliveries_total", "counter", "Events written to clients.", "", deliveries)
	family("seafile_notification_outbox_full_total", "counter", "Clients closed since they were too slow.", "", s.counts[[2]string{"closed_total", "outbox-full"}])
	family("process_start_time_seconds", "gauge", "Start of the process, in Unix time.", "", s.started.Unix())
	family("process_resident_memory_bytes", "gauge", "Resident memory.", "", resident*os.Getpagesize())
	family("go_goroutines", "gauge", "Goroutines.", "", runtime.NumGoroutine())
	return lines
}
