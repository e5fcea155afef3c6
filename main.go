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
// The section [notification] of DIR/seafile.conf configures it, or the environment
// does: notification-server -h lists all settings. README.md tells how to install it.
//
// # The life of an event
//
//	seaf-server  → POST /events → handler   checks the token, parses the event
//	             → hub.publish              finds the library's subscriptions, puts the
//	                                        event into the outbox of each client
//	             → client.writeOutbox       writes to the socket, with no lock held
//
// An event for a group waits in its library's queue, and what follows it waits
// behind it, until seaf-server has told who is in the group (hub.resolve).
//
// # Which part refers to which
//
//	server → handler → hub ⇄ library ⇄ subscription ⇄ client → socket
//	            ├→ verifier (tokens)
//	            └→ groups (members)        all of them → metrics, logger
//
// # Where to look
//
//	what a token may say                verifier.open, parseClaims; verifyEvent, verifySubscription
//	who gets an event, in which order   hub.publish, deliver, event.isFor, sendOrKeep; for a group:
//	                                      queueWaiting, resolve; again: repeatFirst, welcome, keep;
//	                                      not in order: client.dropOlderUpdates
//	a client that reads slowly          client.admit; hub.pingOrClose if nothing moves
//	a client that vanished              hub.pingOrClose, client.end
//	a client that sends rubbish         frameHeader.fault, client.readPayload, handleControl,
//	                                      handleMessage, refuseSubscription
//	who writes to a socket              client.writeOutbox and writeRest alone, once the upgrade is
//	                                      answered; before that net/http and x/net/websocket
//	the last five seconds               server.stop, hub.closeAll, logger.close
//	what is logged at info              the head of the part Log
//	a new type of event, setting        the constants at repoUpdate, config
//	a new metric                        the head of the part Metrics
//
// # Goroutines and what ends each
//
//	server.loop: signals and ticks         a signal, or the listener's end
//	http.Server.Serve, also for metrics    the listener's end
//	net/http: one for each connection,     its deadlines; an upgrade; shutdown
//	  and one that waits for its next byte
//	client.serve: one for each client      a read error, which client.abort causes; or both
//	                                         close frames
//	client.readFrames: for each client     the end of what has come, a read error, or 20 s
//	  that sends more than the empty         without a slot
//	  pings of a trusted one
//	writeAll: a batch of clients           it never waits: it ends by itself
//	client.writeRest: a slow client        all is written, or client.abort
//	handler.findMembers: one for each      seaf-server's answer, or 5 s, or 10 s if the
//	  group event that waits                 process was stopped meanwhile
//	groups.answer: one for each question   the same; a file system that hangs can hold up four
//	memoryReturner: one each 10 s          it ends by itself
//	writeSoon: for standard error          its write; at most two hang in it
//	logger.writeLoop: one                  logger.close
//
// # Locks
//
// hub.mu guards the map and all that is reached from it: libraries, subscriptions, renewals,
// repeats, and the fields of client and event that say so. A client's mu guards its outbox and how
// it is being closed, and may be taken while hub.mu is held; the reverse never happens. metrics.mu
// may be taken under a client's mu. Each counter of metrics, groups, plainLimit and the logger have a
// lock of their own, under which no other is taken. No lock is held across a write to a socket
// or to the log. Semaphores: turns, slots and slotQueue of handler, questions of groups. A client
// that holds a slot may wait for a turn; one that has a turn waits for locks alone.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"container/list"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
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
	"net/netip"
	neturl "net/url"
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
	"unicode"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// ---- Start and stop ----
//
// Flags, the signals, the ticks that drive the hub, the listening socket, systemd,
// and the last five seconds. It knows nothing of tokens, events or frames. It owns
// the loop in server.loop, and no lock.

const usage = `Usage:

  notification-server -c DIR [-l FILE]          serve
  notification-server -c DIR -check [URL ...]   test a running server
  notification-server -version | -h
`

const manual = `Notification-server tells Seafile's clients and web pages at once what changed.

` + usage + `
DIR holds seafile.conf; it may also name that file itself. The log is appended
to FILE; without -l, or with -l -, it goes to standard error.

With JWT_PRIVATE_KEY or JWT_PRIVATE_KEY_FILE in the environment, the environment
alone configures the server, as in Seafile 12 and later. Without them it reads the
section [notification] of seafile.conf, as in Seafile 10 and 11, and variables come
before the file. The defaults are this server's only: seaf-server 10 to 12 needs
enabled, host and port in the file.

  enabled          false: do not run (default true)
  host             address to listen on (0.0.0.0)     NOTIFICATION_SERVER_HOST
  port             port to listen on (8083)           NOTIFICATION_SERVER_PORT
  log_level        debug, info, warning, error (info) NOTIFICATION_SERVER_LOG_LEVEL
  jwt_private_key  the key shared with seaf-server    JWT_PRIVATE_KEY
                   a file that holds only the key     JWT_PRIVATE_KEY_FILE
  metrics          HOST:PORT for /metrics (off)       NOTIFICATION_SERVER_METRICS

The file is read as seaf-server reads it. A comment is a line that begins with #; a
value is everything behind "=", white space at its end included. Without a key in
the environment and without seafile.conf, /run/secrets/JWT_PRIVATE_KEY is tried.

SEAFILE_RPC_PIPE_PATH names the directory of seafile.sock, where seaf-server is asked
for the members of groups. SEAFILE_LOG_TO_STDOUT=true logs to standard output.
SIGTERM, SIGINT and SIGHUP stop it. SIGUSR1 opens the log anew, SIGUSR2 writes the
metrics to it.

-check does all that seaf-server and a client do, at the URL by which clients come, or
at host and port, and says what works and what does not. With a URL for each server of
a cluster, an event posted once, to INNER_NOTIFICATION_SERVER_URL or to host and port
of seafile.conf as seaf-server reads them, must reach all. Its exit status is 0 if
notifications work, and 1 if not.
`

const (
	tickInterval  = 100 * time.Millisecond // of hub.tick
	notifyWait    = 50 * time.Millisecond  // for systemd's socket, and again for the state
	requestsWait  = 700 * time.Millisecond // for requests in flight, at the end
	memoryPeriod  = 10 * time.Second       // between two returns of memory to the system
	unreadRequest = 100 * time.Millisecond // for accepted connections, see stop
)

// A clock tells the time. Tests have one of their own.
type clock struct {
	wall   func() time.Time     // time of day: tokens expire by it, also after it was set anew
	uptime func() time.Duration // since the start: silence and delays are measured by it
}

// unix is the time of day in Unix seconds, as in tokens.
func (c clock) unix() float64 { return float64(c.wall().UnixMicro()) / 1e6 }

func main() {
	// This memory is never touched, and so takes none. But the garbage collector counts it and
	// runs less often while the server is small: an event costs 15 % less CPU (loadgen, 1,000
	// libraries). A higher GOGC would cost a large server its memory.
	ballast := make([]byte, 16<<20)
	start := time.Now()
	uptime := func() time.Duration { return time.Since(start) }
	status := run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr, clock{time.Now, uptime})
	runtime.KeepAlive(ballast)
	os.Exit(status)
}

// run returns the exit status: 0 after a stop or if disabled, 1 if the server
// cannot run or the check fails, 2 for wrong flags.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer, clk clock) int {
	flags := flag.NewFlagSet("notification-server", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {}
	dir := flags.String("c", "", "")
	logFile := flags.String("l", "", "")
	check := flags.Bool("check", false, "")
	version := flags.Bool("version", false, "")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp): // -h, -help
		fmt.Fprint(stdout, manual)
		return 0
	case err != nil: // flags has said why
		fmt.Fprint(stderr, usage)
		return 2
	case flags.NArg() > 0 && !*check:
		fmt.Fprintf(stderr, "notification-server: %q is too much\n%s", flags.Args(), usage)
		return 2
	case *version:
		build := "(unknown version)"
		if info, ok := debug.ReadBuildInfo(); ok {
			build = info.Main.Version
		}
		fmt.Fprintln(stdout, "notification-server", build, runtime.Version())
		return 0
	case *dir == "":
		fmt.Fprintf(stderr, "notification-server: -c DIR is missing\n%s", usage)
		return 2
	case *check:
		return runCheck(*dir, flags.Args(), getenv, stdout)
	}
	// Go would end the process when it writes to a standard error that nobody reads.
	signal.Ignore(syscall.SIGPIPE)
	toStdout := logToStdout(getenv)
	lg := openLog(*logFile, toStdout, stdout, stderr, clk.uptime)
	defer lg.close()
	if err := serve(*dir, getenv, lg, clk); err != nil {
		lg.errorf("%v", err)
		if !toStdout && *logFile != "" && *logFile != "-" {
			// An administrator looks into the log, and to where it was started.
			writeSoon(stderr, fmt.Sprintf("notification-server: %v\n", err))
		}
		return 1
	}
	return 0
}

// writeSoon writes text to w, but waits at most 100 ms, since perhaps nobody reads it. It reports
// whether it was written by then; if not, a goroutine hangs in the write.
func writeSoon(w io.Writer, text string) bool {
	written := make(chan struct{})
	go func() {
		defer close(written)
		io.WriteString(w, text)
	}()
	select {
	case <-written:
		return true
	case <-time.After(100 * time.Millisecond):
		return false
	}
}

// A server holds the parts of a running notification server.
type server struct {
	cfg     *config
	clock   clock
	log     *logger
	metrics *metrics
	hub     *hub
	http    *http.Server

	handler *handler

	clientListener  *plainListener
	metricsListener net.Listener // nil for none
	memory          memoryReturner
}

// newServer returns a server that does not listen yet.
func newServer(cfg *config, lg *logger, clk clock) *server {
	m := newMetrics(clk.wall())
	h := newHub(clk, lg, m, maxClients())
	v := &verifier{cfg.key, clk}
	groups := newGroups(cfg.seafileSocket, cfg.sockets)
	handler := newHandler(h, v, groups)
	return &server{
		cfg:     cfg,
		clock:   clk,
		log:     lg,
		metrics: m,
		hub:     h,
		handler: handler,
		http:    newHTTPServer(handler, lg),
	}
}

// serve runs a server until a signal stops it.
func serve(dir string, getenv func(string) string, lg *logger, clk clock) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR1, syscall.SIGUSR2)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signal.Notify(signals, syscall.SIGHUP)
	}
	cfg, err := loadConfig(dir, getenv, runPath)
	if err != nil {
		return err
	}
	lg.setLevel(cfg.logLevel)
	for _, text := range slices.Concat(cfg.faults, cfg.warnings) {
		lg.warnf("%s", text)
	}
	if !cfg.enabled {
		lg.infof("the notification server is disabled in %s: enabled = false", cfg.offFrom)
		return nil
	}
	s := newServer(cfg, lg, clk)
	ln, err := listen(cfg, getenv)
	if err != nil {
		return err
	}
	s.clientListener = &plainListener{ln, &s.handler.plain}
	if err := s.serveMetrics(); err != nil {
		return err
	}
	members := cfg.seafileSocket()
	if members == "" {
		members = "seafile.sock, which is not there yet: " + strings.Join(cfg.sockets, ", ")
	}
	lg.infof("notification server started on %s; configuration: %s; "+
		"group members are asked of %s; at most %d clients, by the limit of open files",
		s.clientListener.Addr(), cfg.source, members, s.handler.maxClients)
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(s.clientListener) }()
	notifySystemd(getenv, "READY=1")
	return s.loop(signals, served, getenv)
}

// serveMetrics serves /metrics on its own port, if one is configured.
func (s *server) serveMetrics() error {
	if s.cfg.metrics == "" {
		return nil
	}
	ln, err := net.Listen("tcp", s.cfg.metrics)
	if err != nil {
		return fmt.Errorf("cannot serve metrics: %w: "+
			"set metrics to an address of this machine with a port that is free", err)
	}
	s.metricsListener = ln
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		s.writeMetrics(w)
	})
	go func() {
		err := newHTTPServer(mux, s.log).Serve(&plainListener{ln, &s.handler.plain})
		if !errors.Is(err, net.ErrClosed) {
			s.log.errorf("cannot serve metrics on %s any more: %v: restart this server",
				ln.Addr(), err)
		}
	}()
	return nil
}

func (s *server) writeMetrics(w io.Writer) {
	g := s.hub.gauges()
	g.logLinesDropped = s.log.linesDropped()
	s.metrics.write(w, g)
}

// loop handles ticks and signals, until a signal stops the server.
func (s *server) loop(
	signals <-chan os.Signal, served <-chan error, getenv func(string) string,
) error {
	ticks := time.NewTicker(tickInterval)
	defer ticks.Stop()
	var watchdog <-chan time.Time // nil: never
	if period, _ := strconv.Atoi(getenv("WATCHDOG_USEC")); period > 1 {
		half := time.NewTicker(time.Duration(period) * time.Microsecond / 2)
		defer half.Stop()
		watchdog = half.C
	}
	healthy := true // no tick panicked since the last word to systemd
	for {
		select {
		case <-ticks.C:
			healthy = s.hub.tick() && healthy
			s.handler.plain.makeRoom()
			s.memory.tick(s.clock.uptime())
		case <-watchdog:
			// This takes hub.mu and the locks of the metrics. If one of them is stuck, or the
			// ticks panic, systemd hears nothing any more, and starts the server anew.
			s.writeMetrics(io.Discard)
			if healthy {
				notifySystemd(getenv, "WATCHDOG=1")
			}
			healthy = true
		case err := <-served:
			return fmt.Errorf("cannot accept connections on %s any more: %w",
				s.clientListener.Addr(), err)
		case sig := <-signals:
			switch sig {
			case syscall.SIGUSR1:
				s.log.wake() // writeLoop looks whether the file was renamed
			case syscall.SIGUSR2:
				s.logMetrics()
			default:
				s.log.infof("stopping on signal %q", sig)
				notifySystemd(getenv, "STOPPING=1")
				s.stop()
				s.log.infof("stopped")
				return nil
			}
		}
	}
}

// logMetrics writes the metrics as one line to the log.
func (s *server) logMetrics() {
	var text strings.Builder
	s.writeMetrics(&text)
	var samples []string
	for line := range strings.Lines(text.String()) {
		if !strings.HasPrefix(line, "#") {
			samples = append(samples, strings.TrimSpace(line))
		}
	}
	s.log.infof("metrics: %s", strings.Join(samples, " "))
}

// stop frees the port first, so that the next server can start, then answers the requests in
// flight, then closes all clients and waits for them. It takes less than 5 s.
func (s *server) stop() {
	if s.metricsListener != nil {
		s.metricsListener.Close()
	}
	s.clientListener.Close()
	// net/http drops the requests that it has accepted but not read when it shuts down.
	time.Sleep(unreadRequest)
	ctx, cancel := context.WithTimeout(context.Background(), requestsWait)
	defer cancel()
	s.http.Shutdown(ctx)
	s.hub.closeAll()
}

// listen takes the socket that systemd hands over (sd_listen_fds(3)), or opens the
// configured one.
func listen(cfg *config, getenv func(string) string) (net.Listener, error) {
	handed := getenv("LISTEN_FDS")
	if getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) && handed != "" && handed != "0" {
		return listenHanded(handed)
	}
	// No keep-alive probes of TCP: the server pings its clients.
	lc := net.ListenConfig{KeepAlive: -1}
	ln, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort(cfg.host, cfg.port))
	var noAddress *net.DNSError
	switch {
	case errors.As(err, &noAddress):
		return nil, fmt.Errorf("cannot listen: host %s (%s) has no address here: %w: set it to an "+
			"address of this machine or to 0.0.0.0; with seafile.conf of Seafile 12, set "+
			"JWT_PRIVATE_KEY in the environment: host in the file then tells only seaf-server",
			cfg.host, cfg.hostFrom, err)
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("cannot listen: %w: another server, an earlier start of this one, "+
			"or systemd holds the port: stop it first (pkill -f \"notification-server -c\", or "+
			"systemctl stop notification-server.socket), or change port in %s", err, cfg.portFrom)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("cannot listen: %w: this machine has no such address: set host "+
			"(%s) to one of its own or to 0.0.0.0; in a cluster, start the server on that node only",
			err, cfg.hostFrom)
	case err != nil:
		return nil, fmt.Errorf("cannot listen: %w: "+
			"check host (%s) and port (%s), and that this user may use them",
			err, cfg.hostFrom, cfg.portFrom)
	}
	return ln, nil
}

// listenHanded takes the one socket from systemd; handed is how many it hands over.
func listenHanded(handed string) (net.Listener, error) {
	if handed != "1" {
		return nil, fmt.Errorf("systemd handed over %s sockets, but only one can be served: "+
			"the .socket unit needs one ListenStream=, not more", handed)
	}
	file := os.NewFile(3, "socket from systemd") // SD_LISTEN_FDS_START
	defer file.Close()                           // FileListener has its own copy
	ln, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("cannot serve the socket that systemd handed over: %w: "+
			"the .socket unit needs one ListenStream=", err)
	}
	return ln, nil
}

// notifySystemd tells systemd the state of the service (sd_notify(3)), if it asks for
// it. A leading @ means the abstract name space, in Go as in systemd.
func notifySystemd(getenv func(string) string, state string) {
	path := getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	conn, err := net.DialTimeout("unixgram", path, notifyWait)
	if err != nil {
		return // systemd notices by itself what does not come
	}
	defer conn.Close()
	conn.SetWriteDeadline(time.Now().Add(notifyWait))
	io.WriteString(conn, state)
}

// A memoryReturner gives memory back to the system after a burst. Go alone takes
// minutes to do so. It stays idle while there was no garbage collection.
type memoryReturner struct {
	last        time.Duration // uptime of the last look
	collections int64
}

func (r *memoryReturner) tick(uptime time.Duration) {
	if uptime-r.last < memoryPeriod {
		return
	}
	r.last = uptime
	var stats debug.GCStats
	debug.ReadGCStats(&stats)
	if stats.NumGC > r.collections {
		go debug.FreeOSMemory() // with many clients it takes longer than a tick
		r.collections = stats.NumGC + 1
	}
}

// recoverPanic, deferred, keeps a bug in one goroutine from ending the process.
func recoverPanic(lg *logger, what string) {
	if p := recover(); p != nil {
		logPanic(lg, what, p)
	}
}

// logPanic logs a panic, at most once a minute for each text: it may come with every tick.
func logPanic(lg *logger, what string, p any) {
	if lg.takeMinute(fmt.Sprint("panic: ", p)) {
		lg.errorf("%s: a bug in this server: %v; please report this: %s", what, p, debug.Stack())
	}
}

// ---- Configuration ----
//
// What the environment and seafile.conf say. Nothing else reads the file, and of the environment
// nothing but systemd's variables. loadConfig returns a config or an error, and logs nothing. It
// shows no key in any text. This part has no lock and starts no goroutine.

// A config is what the server needs to know. A new setting is a field here, a method like
// readMetrics that configLoader.readSettings calls and puts into source, and a line in the manual.
type config struct {
	file       string // path of seafile.conf, whether it was read or not
	source     string // for the start line: where each setting came from, in one line
	enabled    bool   // false: do not run, and the fields below are not checked
	offFrom    string // FILE:LINE of enabled
	host, port string // to listen on; host without brackets
	hostFrom   string // where to change host: FILE:LINE, FILE or "environment variable X"
	portFrom   string // the same of port
	logLevel   slog.Level
	key        []byte   // shared with seaf-server
	metrics    string   // HOST:PORT to serve /metrics on, or "" for none
	sockets    []string // where seafile.sock may be, in order; the first that exists is asked
	warnings   []string // for the log at each start: sentences with their place in front
	faults     []string // like warnings, but these stop notifications
	senders    senders  // how the programs that post events are configured
}

// senders is what loadConfig saw of the configuration of the programs that post events:
// seaf-server and the file server. -check compares it with the address it listens on.
type senders struct {
	// environmentAlone: the key came from JWT_PRIVATE_KEY, JWT_PRIVATE_KEY_FILE or
	// /run/secrets, as in Seafile 12 and later. seafile.conf was not read.
	environmentAlone bool

	// Seafile 10 to 12 read these in [notification] of seafile.conf. The values are
	// as seaf-server reads them, not as this server does. Both are zero if
	// environmentAlone.
	host string // as written, with brackets; "" if it is missing or of no use
	port int    // missing or unreadable is 0

	// Seafile 13 and 14 read these variables; here as in this process's environment,
	// which need not be theirs. "" is unset.
	enableVariable string // ENABLE_NOTIFICATION_SERVER, "true" is on
	innerURL       string // INNER_NOTIFICATION_SERVER_URL, to which events are posted
}

const (
	section = "notification" // of seafile.conf

	// runPath is where Docker mounts secrets, and Debian's packages have seafile.sock.
	runPath = "/run"

	maxConfigSize = 1 << 20         // bytes of seafile.conf or of a file with a key
	configWait    = 5 * time.Second // for a file that is a pipe
	minKeySize    = 32              // bytes; RFC 7518, section 3.2 asks for as many as the hash has

	// manualKey is printed in Seafile's manual.
	manualKey = "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F"

	newKeyRemedy = `make one with "openssl rand -base64 32", the same for seaf-server, ` +
		`and restart Seafile`
)

// loadConfig reads the configuration. path is what -c names: the directory of
// seafile.conf, or that file. If the environment has a key, it alone configures, as in
// the server that Seafile 12 and later ship, and seafile.conf is not opened. An error
// says what to do, and so do the warnings and faults of the config. runDir is runPath, but
// not in tests.
func loadConfig(path string, getenv func(string) string, runDir string) (*config, error) {
	l := &configLoader{cfg: &config{enabled: true}, getenv: getenv, runDir: runDir}
	if err := l.locate(path); err != nil {
		return nil, err
	}
	l.findSockets()
	l.cfg.senders.enableVariable = l.variable("ENABLE_NOTIFICATION_SERVER").value
	l.cfg.senders.innerURL = l.variable("INNER_NOTIFICATION_SERVER_URL").value
	l.variable("SEAFILE_LOG_TO_STDOUT") // only for its warning, see logToStdout
	key, err := l.environmentKey()
	if err != nil {
		return nil, err
	}
	if key.place == "" {
		key, err = l.readFile()
		if err != nil {
			return nil, err
		}
	}
	if !l.cfg.enabled {
		l.cfg.warnings, l.cfg.faults = nil, nil
		return l.cfg, nil
	}
	if err := l.readSettings(key); err != nil {
		return nil, err
	}
	return l.cfg, nil
}

// logToStdout reports whether the environment asks for the log on standard output.
func logToStdout(getenv func(string) string) bool {
	return withoutQuotes(getenv("SEAFILE_LOG_TO_STDOUT")) == "true"
}

// seafileSocket returns the first seafile.sock that exists at this moment, or "".
func (cfg *config) seafileSocket() string {
	for _, path := range cfg.sockets {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

// A setting is a value and where it came from.
type setting struct {
	value string
	place string // FILE:LINE or "environment variable X"; "" if it is set nowhere
}

// from names the place, for the line at the start.
func (s setting) from() string {
	if s.place == "" {
		return "by default"
	}
	return "from " + s.place
}

// A configLoader does the steps of loadConfig.
type configLoader struct {
	cfg    *config
	getenv func(string) string
	runDir string              // /run, except in tests
	dir    string              // the one that -c names
	file   *keyFile            // nil if seafile.conf was not read
	meant  map[string]keyValue // what file sets, as far as it can be told; by key
}

// warn adds a warning about something that stands at place.
func (l *configLoader) warn(place, format string, args ...any) {
	l.cfg.warnings = append(l.cfg.warnings, place+": "+fmt.Sprintf(format, args...))
}

// fault adds a fault in seafile.conf at line, or in the whole file if line is 0.
func (l *configLoader) fault(line int, format string, args ...any) {
	l.cfg.faults = append(l.cfg.faults, l.at(line)+": "+fmt.Sprintf(format, args...))
}

// at names a line of seafile.conf; line 0 is the whole file.
func (l *configLoader) at(line int) string {
	if line == 0 {
		return l.cfg.file
	}
	return fmt.Sprintf("%s:%d", l.cfg.file, line)
}

// locate finds out which directory and which file path means.
func (l *configLoader) locate(path string) error {
	l.dir = path
	l.cfg.file = filepath.Join(path, "seafile.conf")
	info, err := os.Stat(path)
	isFile := err == nil && !info.IsDir()
	if isFile || err != nil && strings.HasSuffix(path, ".conf") {
		l.dir = filepath.Dir(path)
		l.cfg.file = path
	}
	if _, err := os.Stat(l.dir); err != nil {
		return fmt.Errorf("cannot read the configuration: %w: "+
			"give the directory that holds seafile.conf with -c", err)
	}
	return nil
}

// findSockets lists where seaf-server's socket may be. It may come to exist later.
func (l *configLoader) findSockets() {
	var places []string
	if rpc := l.variable("SEAFILE_RPC_PIPE_PATH").value; rpc != "" {
		places = append(places, rpc)
	}
	places = append(places,
		filepath.Join(l.dir, "seafile-server-latest/runtime"),
		filepath.Join(l.dir, "../seafile-server-latest/runtime"),
		filepath.Join(l.dir, "../seafile-data"),
		filepath.Join(l.runDir, "seafile"))
	for _, place := range places {
		l.cfg.sockets = append(l.cfg.sockets, filepath.Join(place, "seafile.sock"))
	}
}

// -- The environment --

// variable returns the value of an environment variable without white space and quotes
// around it, of which it warns. They are never intended, but an env file that was copied
// by hand may have them. An empty variable counts as unset.
func (l *configLoader) variable(name string) setting {
	value := l.getenv(name)
	place := "environment variable " + name
	plain := withoutQuotes(value)
	if plain != value {
		l.warn(place, "white space or quotes stand around its value: they are ignored here, "+
			"but other programs take them as part of it: write %s=VALUE without them", name)
	}
	if plain == "" {
		return setting{}
	}
	return setting{plain, place}
}

// withoutQuotes returns value without white space and one pair of quotes around it.
func withoutQuotes(value string) string {
	value = strings.TrimSpace(value)
	for _, quote := range []string{`"`, "'"} {
		if len(value) > 1 && strings.HasPrefix(value, quote) && strings.HasSuffix(value, quote) {
			return strings.TrimSpace(value[1 : len(value)-1])
		}
	}
	return value
}

// environmentKey returns the key that the environment holds or names the file of.
// Without one, its place is "".
func (l *configLoader) environmentKey() (setting, error) {
	value := l.getenv("JWT_PRIVATE_KEY")
	path := l.variable("JWT_PRIVATE_KEY_FILE").value
	switch {
	case value != "" && path != "":
		return setting{}, errors.New("environment variables JWT_PRIVATE_KEY and " +
			"JWT_PRIVATE_KEY_FILE are both set, and only one can hold: remove one of them")
	case path != "" && !filepath.IsAbs(path):
		// The value is not shown: it may be the key.
		return setting{}, errors.New("environment variable JWT_PRIVATE_KEY_FILE: its value is " +
			"not an absolute path: name the file by its whole path; the key itself belongs into " +
			"JWT_PRIVATE_KEY")
	case path != "":
		return l.keyFromFile(path, "environment variable JWT_PRIVATE_KEY_FILE")
	case value != "":
		return l.environmentAlone(setting{value, "environment variable JWT_PRIVATE_KEY"})
	}
	return setting{}, nil
}

// keyFromFile reads a file that holds a key and nothing else, as secrets of Docker,
// Podman and systemd do. One line end behind the key does not count. from is what names path.
func (l *configLoader) keyFromFile(path, from string) (setting, error) {
	if _, err := os.Lstat(path); err != nil {
		// The path is not shown: it may be the key, which may begin with a slash.
		return setting{}, fmt.Errorf("%s: cannot read the key: the file that it names is not "+
			"there, or this user may not enter its directory: name the file that holds the key alone",
			from)
	}
	place := path + " (" + from + ")"
	data, err := readSmallFile(path)
	if err != nil {
		return setting{}, fmt.Errorf("%s: cannot read the key: %w: "+
			"the file must hold the key alone, and be readable to this user", place, err)
	}
	if key, ended := strings.CutSuffix(data, "\n"); ended {
		data = strings.TrimSuffix(key, "\r")
	}
	if data == "" {
		return setting{}, fmt.Errorf("%s: the file is empty: write the key into it, "+
			"the same as JWT_PRIVATE_KEY of Seafile", place)
	}
	return l.environmentAlone(setting{data, place})
}

// environmentAlone notes that the environment alone configures, with this key.
func (l *configLoader) environmentAlone(key setting) (setting, error) {
	plain := withoutQuotes(key.value)
	if plain == "" {
		return setting{}, fmt.Errorf("%s: the key is only white space or quotes: "+
			"set it to JWT_PRIVATE_KEY of Seafile", key.place)
	}
	if plain != key.value {
		l.warn(key.place, "white space, a line end or quotes stand around the key and are taken "+
			"as part of it: if Seafile has the key without them, no token fits: remove them")
	}
	l.cfg.senders.environmentAlone = true
	return key, nil
}

// readSmallFile reads a file, or a pipe whose writer is there already.
func readSmallFile(path string) (string, error) {
	// O_NONBLOCK: a FIFO that nobody writes must not stop the start.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	f.SetReadDeadline(time.Now().Add(configWait)) // fails for a regular file, which needs none
	data, err := io.ReadAll(io.LimitReader(f, maxConfigSize+1))
	if err != nil {
		return "", err
	}
	if len(data) > maxConfigSize {
		return "", fmt.Errorf("%s has more than %d bytes", path, maxConfigSize)
	}
	return string(data), nil
}

// -- seafile.conf --

// readFile reads seafile.conf and returns the key that it holds, if any. Where there is
// no such file, a Docker secret may hold the key.
func (l *configLoader) readFile() (setting, error) {
	data, err := readSmallFile(l.cfg.file)
	if errors.Is(err, os.ErrNotExist) {
		secret := filepath.Join(l.runDir, "secrets/JWT_PRIVATE_KEY")
		if _, err := os.Stat(secret); err == nil {
			return l.keyFromFile(secret, "Docker secret")
		}
	}
	if err != nil {
		return setting{}, fmt.Errorf("cannot read the configuration: %w: it must be readable to "+
			"this user; or set JWT_PRIVATE_KEY or JWT_PRIVATE_KEY_FILE in the environment", err)
	}
	l.file = parseKeyFile(data)
	l.findMeant()
	if err := l.checkLines(); err != nil {
		return setting{}, err
	}
	if err := l.readEnabled(); err != nil {
		return setting{}, err
	}
	if !l.cfg.enabled {
		return setting{}, nil
	}
	l.checkSenders()
	return l.fileKey()
}

// findMeant finds what the file sets: in [notification], or else in sections such as
// [ notification ], which seaf-server ignores.
func (l *configLoader) findMeant() {
	l.meant = map[string]keyValue{}
	for _, name := range l.file.names {
		if meansSection(name) && name != section {
			maps.Copy(l.meant, l.file.groups[name].keys)
		}
	}
	if group := l.file.groups[section]; group != nil {
		maps.Copy(l.meant, group.keys)
	}
}

// meansSection reports whether name is that of our section, also with white space in
// the brackets, with which seaf-server takes it for another one.
func meansSection(name string) bool {
	return strings.TrimSpace(name) == section
}

// checkLines looks at the lines for which seaf-server refuses the whole file. One in
// our section is an error where nobody can tell what it is meant to set.
func (l *configLoader) checkLines() error {
	if len(l.file.bad) == 0 {
		return nil
	}
	for _, bad := range l.file.bad {
		switch bad.fault {
		case faultNoPair, faultNoKey, faultHeaderOpen:
			opens := strings.HasPrefix(strings.TrimSpace(bad.header), section)
			if opens || meansSection(bad.group) {
				return fmt.Errorf("%s: seaf-server 10 to 12 refuses the whole file, and so does "+
					"this server, since this line cannot be understood: %s",
					l.at(bad.line), bad.fault)
			}
		}
	}
	first := l.file.bad[0]
	more := ""
	if n := len(l.file.bad) - 1; n > 0 {
		more = fmt.Sprintf("; %d more such lines follow, the next is line %d", n, l.file.bad[1].line)
	}
	l.fault(first.line, "seaf-server 10 to 12 refuses the whole file and does not start: %s%s",
		first.fault, more)
	return nil
}

// readEnabled reads whether the server is to run.
func (l *configLoader) readEnabled() error {
	v := l.meant["enabled"]
	if trimASCII(v.raw) == "" {
		return nil // checkSenders tells that seaf-server takes this for off
	}
	enabled, ok := v.boolean()
	if !ok {
		word, _, _ := strings.Cut(trimASCII(v.raw), " ")
		switch strings.ToLower(strings.Trim(word, `"'`)) {
		case "true", "t", "yes", "on", "1":
			enabled = true
		case "false", "f", "no", "off", "0":
			enabled = false
		default:
			return fmt.Errorf("%s: enabled must be true or false: correct it", l.at(v.line))
		}
	}
	l.cfg.enabled = enabled
	l.cfg.offFrom = l.at(v.line)
	return nil
}

// checkSenders notes what seaf-server 10 to 12 makes of host and port, and the faults for
// which it sends no event.
func (l *configLoader) checkSenders() {
	for _, name := range l.file.names {
		if meansSection(name) && name != section {
			l.fault(l.file.groups[name].line, "seaf-server 10 to 12 takes [%s] for another "+
				"section than [notification] and reads nothing of it: write [notification], "+
				"without white space in the brackets", name)
		}
	}
	if l.file.groups[section] == nil {
		return // a fault or the missing key says so
	}
	v, ok := l.senderValue("enabled", "enabled = true")
	if _, readable := v.boolean(); ok && !readable {
		l.fault(v.line, "seaf-server 10 to 12 takes this value of enabled for off: "+
			"write enabled = true, in lower case and with nothing behind it")
	}
	v, ok = l.senderValue("host", "host = ADDRESS with the address of this server, "+
		"127.0.0.1 on the same machine")
	if ok {
		l.checkSenderHost(v)
	}
	v, ok = l.senderValue("port", "port = 8083")
	port, _ := v.integer()
	l.cfg.senders.port = port
	if ok && (port < 1 || port > 65535) {
		// It is also an error, unless the environment sets the port to listen on.
		l.fault(v.line, "port is no number from 1 to 65535, so seaf-server 10 to 12 sends no "+
			"events: write port = 8083")
	}
}

// senderValue returns what seaf-server finds for key. If key is missing, it adds a
// fault that suggests to add line.
func (l *configLoader) senderValue(key, line string) (keyValue, bool) {
	group := l.file.groups[section]
	v, ok := group.keys[key]
	if !ok {
		l.fault(group.line, "%s is missing in this section, so seaf-server 10 to 12 sends no "+
			"events: add the line %s", key, line)
	}
	return v, ok
}

func (l *configLoader) checkSenderHost(v keyValue) {
	host, ok := v.text()
	plain := trimASCII(host)
	switch {
	case !ok:
		l.fault(v.line, "seaf-server 10 to 12 cannot read host, because it is not UTF-8, or "+
			"holds a backslash, so it sends no events: correct it")
	case plain == "":
		l.fault(v.line, "host is empty, so seaf-server 10 to 12 sends no events: "+
			"write host = ADDRESS with the address of this server, 127.0.0.1 on the same machine")
	case plain != host:
		l.fault(v.line, "white space stands behind host, and seaf-server 10 to 12 takes it as "+
			"part of the address, so it sends no events: remove it")
	case strings.Contains(host, ":") && !strings.HasPrefix(host, "["):
		l.fault(v.line, "seaf-server 10 to 12 makes a URL of host as it is written, and an IPv6 "+
			"address without brackets gives none, so it sends no events: write host = [%s]", host)
	default:
		l.cfg.senders.host = host
	}
}

// fileKey returns the key of seafile.conf, with warnings where Seafile's programs may
// read it in more than one way.
func (l *configLoader) fileKey() (setting, error) {
	v := l.meant["jwt_private_key"]
	key, readable := v.text()
	if strings.TrimSpace(key) == "" {
		return setting{}, l.noKey(v.line)
	}
	place := l.at(v.line)
	switch {
	case !readable:
		l.fault(v.line, "seaf-server 10 and 11 cannot read jwt_private_key, because it is not "+
			"UTF-8, or holds a backslash that begins none of \\\\ \\s \\t \\n \\r: %s", newKeyRemedy)
	case strings.Contains(v.raw, `\`):
		l.warn(place, "jwt_private_key holds a backslash, which seaf-server and this server take "+
			"as the start of an escape, but Seafile's web part may not: %s", newKeyRemedy)
	}
	if trimASCII(v.raw) != v.raw {
		l.warn(place, "jwt_private_key ends in white space, which seaf-server and this server "+
			"take as part of the key, but Seafile's web part may not: remove it and restart Seafile")
	}
	return setting{key, place}, nil
}

// noKey says that there is no key, and as far as can be told, why. line is that of an
// empty jwt_private_key, or 0.
func (l *configLoader) noKey(line int) error {
	reason := ""
	if group := l.file.groups[section]; line == 0 && group != nil {
		line = group.line
	}
	for _, name := range l.file.names {
		if !meansSection(name) && strings.EqualFold(strings.TrimSpace(name), section) {
			reason = fmt.Sprintf(" (line %d says [%s], but the name must be in lower case)",
				l.file.groups[name].line, name)
		}
	}
	if len(l.file.bad) > 0 {
		bad := l.file.bad[0]
		reason = fmt.Sprintf(" (and in line %d, %s)", bad.line, bad.fault)
	}
	return fmt.Errorf("%s: section [notification] has no jwt_private_key%s, and the environment "+
		"has neither JWT_PRIVATE_KEY nor JWT_PRIVATE_KEY_FILE: in Seafile 12 and later, set the "+
		"JWT_PRIVATE_KEY that Seafile has; in 10 and 11, %s", l.at(line), reason, newKeyRemedy)
}

// -- The settings --

// readSettings reads all settings but enabled: each from the environment if it is set
// there, else from seafile.conf if that was read.
func (l *configLoader) readSettings(key setting) error {
	l.checkKey(key)
	host, err := l.readHost()
	if err != nil {
		return err
	}
	port, err := l.readPort()
	if err != nil {
		return err
	}
	metrics, err := l.readMetrics()
	if err != nil {
		return err
	}
	level := l.readLogLevel()
	l.cfg.source = fmt.Sprintf("host %s, port %s, log_level %s, jwt_private_key %s",
		host.from(), port.from(), level.from(), key.from())
	if metrics.place != "" {
		l.cfg.source += ", metrics " + metrics.from()
	}
	if l.cfg.senders.environmentAlone {
		l.cfg.source += " (the environment alone; seafile.conf is not read)"
	}
	return nil
}

// setting returns what the environment says, or else the file.
func (l *configLoader) setting(key, variable string) setting {
	if s := l.variable(variable); s.value != "" {
		return s
	}
	v := l.meant[key]
	text, _ := v.text()
	text = trimASCII(text)
	if text == "" {
		return setting{}
	}
	return setting{text, l.at(v.line)}
}

// placeFor returns where to change s: where it is set, or else where it can be set.
func (l *configLoader) placeFor(s setting, variable string) string {
	switch {
	case s.place != "":
		return s.place
	case l.file != nil:
		return l.cfg.file
	}
	return "environment variable " + variable
}

// checkKey takes the key, and warns of one that can be guessed.
func (l *configLoader) checkKey(key setting) {
	l.cfg.key = []byte(key.value)
	if key.value == manualKey {
		l.warn(key.place, "jwt_private_key is the one printed in Seafile's manual, "+
			"with which anyone can forge events and read them: %s", newKeyRemedy)
	}
	if len(key.value) < minKeySize {
		l.warn(key.place, "jwt_private_key is shorter than %d bytes and may be guessed: %s",
			minKeySize, newKeyRemedy)
	}
}

func (l *configLoader) readHost() (setting, error) {
	host := l.setting("host", "NOTIFICATION_SERVER_HOST")
	l.cfg.host = "0.0.0.0"
	l.cfg.hostFrom = l.placeFor(host, "NOTIFICATION_SERVER_HOST")
	if host.value == "" {
		return host, nil
	}
	var ok bool
	if l.cfg.host, ok = plainHost(host.value); !ok {
		return host, fmt.Errorf("%s: host must be an address or a name, without http:// and "+
			"without a port, as in 127.0.0.1 or [::1], not %q%s",
			host.place, host.value, commentHint(host.value))
	}
	return host, nil
}

// plainHost returns host without brackets, and whether it can be an address or a name.
func plainHost(host string) (string, bool) {
	inside, open := strings.CutPrefix(host, "[")
	inside, closed := strings.CutSuffix(inside, "]")
	addr, err := netip.ParseAddr(inside)
	if open || closed {
		return inside, open && closed && err == nil && addr.Is6()
	}
	if err == nil {
		return host, true
	}
	for _, r := range host {
		if !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-._", r) {
			return host, false
		}
	}
	return host, true
}

func (l *configLoader) readPort() (setting, error) {
	l.cfg.port = "8083"
	l.cfg.portFrom = l.placeFor(setting{}, "NOTIFICATION_SERVER_PORT")
	s := l.variable("NOTIFICATION_SERVER_PORT")
	scheme, _, _ := strings.Cut(s.value, "://")
	if scheme == "tcp" || scheme == "udp" {
		l.warn(s.place, "a %s:// address is what Kubernetes sets for a Service named "+
			"notification-server, not a port, and is ignored: set enableServiceLinks: false, "+
			"or give the Service another name", scheme)
		s = setting{}
	}
	if s.value != "" {
		number, err := strconv.Atoi(s.value)
		return s, l.takePort(number, err == nil, s)
	}
	v := l.meant["port"]
	if trimASCII(v.raw) == "" {
		return setting{}, nil
	}
	s = setting{trimASCII(v.raw), l.at(v.line)}
	number, ok := v.integer()
	return s, l.takePort(number, ok, s)
}

// takePort sets the port to listen on; ok is false if s is no number.
func (l *configLoader) takePort(number int, ok bool, s setting) error {
	if !ok || number < 1 || number > 65535 {
		return fmt.Errorf("%s: port must be a number from 1 to 65535, not %q%s",
			s.place, s.value, commentHint(s.value))
	}
	l.cfg.port = strconv.Itoa(number)
	l.cfg.portFrom = s.place
	return nil
}

func (l *configLoader) readMetrics() (setting, error) {
	metrics := l.setting("metrics", "NOTIFICATION_SERVER_METRICS")
	if metrics.value == "" {
		return metrics, nil
	}
	if _, _, err := net.SplitHostPort(metrics.value); err != nil {
		return metrics, fmt.Errorf("%s: metrics must be HOST:PORT, as in 127.0.0.1:9083, not %q%s",
			metrics.place, metrics.value, commentHint(metrics.value))
	}
	l.cfg.metrics = metrics.value
	return metrics, nil
}

// readLogLevel never fails: a log at the wrong level is better than no notifications.
func (l *configLoader) readLogLevel() setting {
	l.cfg.logLevel = slog.LevelInfo
	level := l.setting("log_level", "NOTIFICATION_SERVER_LOG_LEVEL")
	switch strings.ToLower(level.value) {
	case "debug":
		l.cfg.logLevel = slog.LevelDebug
	case "info", "":
	case "warning", "warn":
		l.cfg.logLevel = slog.LevelWarn
	case "error":
		l.cfg.logLevel = slog.LevelError
	default:
		l.warn(level.place, "log_level %q is not known and means info: "+
			"use debug, info, warning or error", level.value)
	}
	return level
}

// commentHint explains a value that is wrong for the comment behind it.
func commentHint(value string) string {
	if strings.ContainsAny(value, "#;") {
		return ": a comment needs a line of its own, which begins with #"
	}
	return ""
}

// -- The format of seafile.conf --

// A keyFile is what GLib's GKeyFile, with which seaf-server 10 to 12 reads seafile.conf,
// makes of a file. GKeyFile refuses a file at its first bad line. Here reading goes on
// behind it, so that what is meant can be told.
type keyFile struct {
	groups map[string]*keyGroup // by name; a group given twice is one
	names  []string             // of the groups, in order
	bad    []badLine            // in order; GKeyFile refuses the file at the first
}

type keyGroup struct {
	line int                 // of its first header
	keys map[string]keyValue // by name; of a key given twice, the last
}

// A badLine is a line for which GKeyFile refuses the file.
type badLine struct {
	line   int
	group  string // in which it stands
	fault  lineFault
	header string // of a header that is not closed: what stands behind its bracket
}

// A lineFault says what is wrong with a line, and what to do.
type lineFault string

const (
	faultBOM lineFault = "the file begins with a byte order mark: " +
		"save it as UTF-8 without one"
	faultSemicolon lineFault = "the line begins with ;, which is no comment there: " +
		"begin comments with #"
	// The line is not shown: it may be the key.
	faultNoPair lineFault = "the line is neither \"key = value\" nor a comment, " +
		"which begins with #: correct or remove it"
	faultNoKey lineFault = "no key stands before the =: " +
		"correct or remove the line"
	faultNoGroup lineFault = "a setting stands before the first section: " +
		"move it below the header of its section"
	faultHeaderOpen lineFault = "a section header must end with its bracket, " +
		"as in [notification]: correct it"
	faultBehindHeader lineFault = "something stands behind a section header: " +
		"move it to a line of its own"
	faultGroupName lineFault = "the name of a section is empty, or holds [ or a control " +
		"character: correct it"
	faultKeyName lineFault = "the name of a key holds a bracket: " +
		"correct it"
	faultEncoding lineFault = "the first section sets Encoding, but not to UTF-8: " +
		"remove the line"
)

// parseKeyFile reads data as GLib's g_key_file_load_from_file does. The file is refused
// if there is a bad line.
func parseKeyFile(data string) *keyFile {
	p := &keyFileParser{file: &keyFile{groups: map[string]*keyGroup{}}}
	if rest, found := strings.CutPrefix(data, "\ufeff"); found {
		p.file.bad = []badLine{{line: 1, fault: faultBOM}}
		data = rest
	}
	for line := range strings.Lines(data) {
		p.line++
		if text, ended := strings.CutSuffix(line, "\n"); ended {
			line = strings.TrimSuffix(text, "\r")
		}
		p.parseLine(line)
	}
	return p.file
}

type keyFileParser struct {
	file  *keyFile
	line  int       // number of the current line, from 1
	name  string    // of the current group
	group *keyGroup // the current one, nil before the first header
}

func (p *keyFileParser) addBad(fault lineFault) {
	p.file.bad = append(p.file.bad, badLine{line: p.line, group: p.name, fault: fault})
}

// parseLine reads one line, without its end. GLib takes a zero byte for the end of a line.
func (p *keyFileParser) parseLine(line string) {
	line = strings.TrimLeft(line, asciiSpace)
	text, behindZero, _ := strings.Cut(line, "\x00")
	switch {
	case text == "" || text[0] == '#':
		return
	case text[0] == '[':
		p.parseHeader(text, behindZero)
		return
	}
	name, _, found := strings.Cut(text, "=")
	switch {
	case !found && text[0] == ';':
		p.addBad(faultSemicolon)
	case !found:
		p.addBad(faultNoPair)
	case name == "":
		p.addBad(faultNoKey)
	case p.group == nil:
		p.addBad(faultNoGroup)
	default:
		value := strings.TrimLeft(line[len(name)+1:], asciiSpace)
		p.addKey(strings.TrimRight(name, asciiSpace), value)
	}
}

// parseHeader reads a line that begins with a bracket. If another ] stands behind a zero byte,
// GLib takes the name up to that one, and refuses it.
func (p *keyFileParser) parseHeader(text, behindZero string) {
	name, behind, closed := strings.Cut(text[1:], "]")
	if !closed {
		p.addBad(faultHeaderOpen)
		p.file.bad[len(p.file.bad)-1].header = name
		p.name, p.group = "", &keyGroup{keys: map[string]keyValue{}}
		return
	}
	behind = skipContinuation(behind)
	for behind != "" && (behind[0] == ' ' || behind[0] == '\t') {
		behind = skipContinuation(behind[1:])
	}
	switch {
	case behind != "":
		p.addBad(faultBehindHeader)
	case name == "" || strings.ContainsFunc(name, badInGroupName),
		strings.Contains(behindZero, "]"):
		p.addBad(faultGroupName)
	}
	p.name = name
	p.group = p.file.groups[name]
	if p.group == nil {
		p.group = &keyGroup{line: p.line, keys: map[string]keyValue{}}
		p.file.groups[name] = p.group
		p.file.names = append(p.file.names, name)
	}
}

func badInGroupName(r rune) bool {
	return r == '[' || r < ' ' || r == 0x7f
}

// addKey adds what stands behind name. For Encoding, GLib compares the
// whole value, also what follows a zero byte.
func (p *keyFileParser) addKey(name, value string) {
	inFirst := len(p.file.names) > 0 && p.name == p.file.names[0]
	switch {
	case !goodKeyName(name):
		p.addBad(faultKeyName)
	case name == "Encoding" && inFirst && !strings.EqualFold(value, "UTF-8"):
		p.addBad(faultEncoding)
	default:
		value, _, _ = strings.Cut(value, "\x00")
		p.group.keys[name] = keyValue{value, p.line}
	}
}

// goodKeyName reports whether GLib takes a name: it may hold no brackets, but for a
// locale at its end, as in Name[de].
func goodKeyName(name string) bool {
	end := strings.IndexAny(name, "[]")
	if end < 0 {
		return true
	}
	if end == 0 || name[end] == ']' || name[end-1] == ' ' {
		return false
	}
	locale, closed := strings.CutSuffix(name[end+1:], "]")
	if !closed {
		return false
	}
	for locale != "" {
		r, _ := utf8.DecodeRuneInString(locale)
		if !unicode.IsLetter(r) && !unicode.IsNumber(r) && !strings.ContainsRune("-_.@", r) {
			return false
		}
		locale = skipContinuation(locale[1:])
	}
	return true
}

// skipContinuation returns s without the bytes at its start that continue a character of
// UTF-8. GLib skips them without a look at the byte before.
func skipContinuation(s string) string {
	for s != "" && !utf8.RuneStart(s[0]) {
		s = s[1:]
	}
	return s
}

// A keyValue is what stands behind a key: from the first character that is no white
// space to the end of the line.
type keyValue struct {
	raw  string
	line int
}

// text returns what g_key_file_get_string does. Where that fails, for an unknown escape or
// what is not UTF-8, it returns what can be made of the value, and false.
func (v keyValue) text() (string, bool) {
	if !utf8.ValidString(v.raw) {
		return trimASCII(v.raw), false
	}
	decode := strings.NewReplacer(`\s`, " ", `\t`, "\t", `\n`, "\n", `\r`, "\r", `\\`, `\`)
	remove := strings.NewReplacer(`\s`, "", `\t`, "", `\n`, "", `\r`, "", `\\`, "")
	return decode.Replace(v.raw), !strings.Contains(remove.Replace(v.raw), `\`)
}

// boolean returns what g_key_file_get_boolean does; ok is false where that fails, which
// seaf-server takes for false.
func (v keyValue) boolean() (value, ok bool) {
	switch strings.TrimRight(v.raw, asciiSpace) {
	case "true", "1":
		return true, true
	case "false", "0":
		return false, true
	}
	return false, false
}

// integer returns what g_key_file_get_integer does; ok is false where that fails, which
// seaf-server takes for 0. White space and then anything may follow the number.
func (v keyValue) integer() (value int, ok bool) {
	text := strings.TrimLeft(v.raw, asciiSpace+"\v") // as strtol, which skips \v too
	if end := strings.IndexAny(text, asciiSpace); end >= 0 {
		text = text[:end]
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil {
		return 0, false
	}
	return int(n), true
}

const asciiSpace = " \t\n\f\r" // as g_ascii_isspace: without \v

// trimASCII removes white space at both ends.
func trimASCII(s string) string {
	return strings.Trim(s, asciiSpace)
}

// ---- Tokens ----
//
// The check of JSON Web Tokens, and the reader of JSON that it shares with events and client
// messages. This part knows the key, the time, and with which status of HTTP it refuses, and
// nothing of requests or connections. It never tries another algorithm than HS256. It has no lock
// and no goroutine.

const (
	maxToken = 8 << 10 // bytes; Seafile's have some 200
	maxNames = 64      // in one JSON object

	// The longest time from now to the end of an event's token. Seafile's programs make them
	// for 5 to 9 minutes; a client's token lives for days.
	maxEventLifetime = time.Hour

	// If a token expired so long ago, a wrong clock is not the cause.
	longExpired = time.Hour
)

// A refusal is an error that is told to whoever caused it.
type refusal struct {
	status int    // of HTTP, or of a close frame
	reason string // one word, for the metrics
	text   string // what was wrong and what to do
}

func (r *refusal) Error() string { return r.text }

func refuse(status int, reason, format string, args ...any) *refusal {
	return &refusal{status, reason, fmt.Sprintf(format, args...)}
}

// quoted quotes at most 100 bytes of a text that came from outside.
func quoted(text string) string {
	return strconv.Quote(text[:min(len(text), 100)])
}

// claims are what a token says (RFC 7519, section 4.1). Each subscription has its
// own: one connection can carry several accounts.
type claims struct {
	expires   float64 // Unix time in seconds
	notBefore float64 // likewise
	repoID    string
	username  string
	foreign   string // names a claim that no token for this server has, "" for none
}

// A verifier checks tokens with the key that this server shares with seaf-server.
type verifier struct {
	key   []byte
	clock clock
}

// verify returns the claims of a token signed with HS256 (RFC 7515, RFC 7519) that is
// valid now. An error is a *refusal with status 401.
func (v *verifier) verify(token string) (claims, error) {
	c, err := v.open(token)
	if err != nil {
		return claims{}, err
	}
	if err := v.checkTime(c); err != nil {
		return claims{}, err
	}
	return c, nil
}

// open returns the claims of a token with a good signature, whether it is valid now or not.
func (v *verifier) open(token string) (claims, error) {
	header, payload, signature, err := splitToken(token)
	if err != nil {
		return claims{}, err
	}
	if err := checkHeader(header); err != nil {
		return claims{}, err
	}
	signed := token[:strings.LastIndexByte(token, '.')]
	if !hmac.Equal(signature, hs256(v.key, signed)) {
		return claims{}, refuse(http.StatusUnauthorized, "signature",
			"the token's signature does not match: jwt_private_key differs between here and "+
				"seaf-server or Seahub, or one of them was not restarted since it changed")
	}
	c, err := parseClaims(payload)
	if err != nil {
		return claims{}, refuse(http.StatusUnauthorized, "malformed",
			"the token's claims are malformed: %v", err)
	}
	return c, nil
}

// checkTime returns a *refusal if a token is not valid now.
func (v *verifier) checkTime(c claims) error {
	now := v.clock.unix()
	switch {
	case c.expires <= now-longExpired.Seconds():
		return refuse(http.StatusUnauthorized, "long-expired",
			"the token expired more than an hour ago")
	case c.expires <= now:
		return refuse(http.StatusUnauthorized, "expired",
			"the token expired %.0f s ago: if this goes on, the clocks of this machine and of "+
				"seaf-server's differ", now-c.expires)
	case c.notBefore > now:
		return refuse(http.StatusUnauthorized, "not-yet",
			"the token is valid only in %.0f s: the clocks of this machine and of its maker's differ",
			c.notBefore-now)
	}
	return nil
}

// verifyEvent checks a token that came with an event. The key signs other tokens, too,
// some of them for visitors without an account, so only what Seafile's own programs put
// into an event's token is accepted.
func (v *verifier) verifyEvent(token string) (claims, error) {
	c, err := v.verify(token)
	switch {
	case err != nil:
		return claims{}, err
	case c.username != "":
		return claims{}, refuse(http.StatusForbidden, "client-token",
			"a client's token is good for subscriptions, not for events")
	case c.foreign != "":
		return claims{}, refuse(http.StatusForbidden, "claims", "the token has the claim %s that "+
			"no event's token has: it was made for something else", c.foreign)
	case c.expires > v.clock.unix()+maxEventLifetime.Seconds():
		return claims{}, refuse(http.StatusForbidden, "lifetime",
			"the token is valid for more than an hour, as no event's token is: it was made for "+
				"something else, or the clocks of this machine and of its maker's differ")
	}
	return c, nil
}

// verifySubscription checks a token that a client has for the library repoID. If the token was
// never good for it, the error says that, and not that it ran out.
func (v *verifier) verifySubscription(token, repoID string) (claims, error) {
	c, err := v.open(token)
	switch {
	case err != nil:
		return claims{}, err
	case c.foreign != "":
		return claims{}, refuse(http.StatusForbidden, "claims", "the token has the claim %s that "+
			"no library's token has: it was made for something else", c.foreign)
	case c.repoID != repoID:
		return claims{}, refuse(http.StatusForbidden, "other-library",
			"the token is for another library")
	}
	if err := v.checkTime(c); err != nil {
		return claims{}, err
	}
	return c, nil
}

// splitToken decodes the three parts of a token.
func splitToken(token string) (header, payload, signature []byte, err error) {
	if len(token) > maxToken {
		return nil, nil, nil, refuse(http.StatusUnauthorized, "malformed",
			"the token is longer than %d bytes", maxToken)
	}
	parts := strings.Split(token, ".")
	// The decoder ignores line ends, so one token could be written in several ways.
	if len(parts) != 3 || strings.ContainsAny(token, "\r\n") {
		return nil, nil, nil, refuse(http.StatusUnauthorized, "malformed",
			"the token is not three parts of base64url")
	}
	var decoded [3][]byte
	for i, part := range parts {
		decoded[i], err = base64.RawURLEncoding.Strict().DecodeString(part)
		if err != nil {
			return nil, nil, nil, refuse(http.StatusUnauthorized, "malformed",
				"the token is not three parts of unpadded base64url")
		}
	}
	return decoded[0], decoded[1], decoded[2], nil
}

// checkHeader accepts a header that names HS256 and no extension that must be
// understood ("crit": RFC 7515, section 4.1.11).
func checkHeader(header []byte) error {
	if string(header) == tokenHeader {
		return nil
	}
	var algorithm string
	var critical bool
	err := readObject(header, func(name, value []byte) error {
		switch string(name) {
		case "alg":
			algorithm, _ = jsonString(value)
		case "crit":
			critical = true
		}
		return nil
	})
	switch {
	case err != nil || algorithm != "HS256":
		return refuse(http.StatusUnauthorized, "algorithm",
			"the token's header does not name HS256")
	case critical:
		return refuse(http.StatusUnauthorized, "algorithm",
			"the token's header names extensions (crit), and this server knows none")
	}
	return nil
}

// tokenHeader is the header that all of Seafile's programs write.
const tokenHeader = `{"alg":"HS256","typ":"JWT"}`

func hs256(key []byte, text string) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(text))
	return mac.Sum(nil)
}

// sign makes a token as seaf-server does.
func sign(key []byte, claims string) string {
	enc := base64.RawURLEncoding
	text := enc.EncodeToString([]byte(tokenHeader)) + "." + enc.EncodeToString([]byte(claims))
	return text + "." + enc.EncodeToString(hs256(key, text))
}

// parseClaims returns the claims of a token. The name of a claim that is unknown, or username if
// that is no string, is in claims.foreign.
func parseClaims(payload []byte) (c claims, err error) {
	expires := false
	err = readObject(payload, func(name, value []byte) (err error) {
		switch string(name) {
		case "exp":
			expires = true
			c.expires, err = jsonNumber(name, value)
		case "nbf":
			c.notBefore, err = jsonNumber(name, value)
		case "iat":
			_, err = jsonNumber(name, value)
		case "repo_id":
			var ok bool
			if c.repoID, ok = jsonString(value); !ok {
				err = errors.New("repo_id is not a string")
			}
		case "username":
			var ok bool
			if c.username, ok = jsonString(value); !ok {
				c.foreign = "username (not a string)"
			}
		default:
			c.foreign = quoted(string(name))
		}
		return err
	})
	if err == nil && !expires {
		err = errors.New("there is no exp")
	}
	return c, err
}

// readObject checks that data is one JSON object in UTF-8 in which no name is given twice, and
// calls visit for each member. Names match in their exact case only.
func readObject(data []byte, visit func(name, value []byte) error) error {
	if !utf8.Valid(data) {
		return errors.New("not UTF-8")
	}
	var compact bytes.Buffer
	compact.Grow(len(data))
	if err := json.Compact(&compact, data); err != nil {
		return err
	}
	var seen [][]byte
	return eachMember(compact.Bytes(), func(name, value []byte) error {
		for _, other := range seen {
			if bytes.Equal(other, name) {
				return fmt.Errorf("%s is given twice", quoted(string(name)))
			}
		}
		if len(seen) == maxNames {
			return fmt.Errorf("more than %d names in one object", maxNames)
		}
		seen = append(seen, name)
		return visit(name, value)
	})
}

// parseEnvelope returns type and content of an event or of a client's message:
// {"type": ..., "content": ...}. The content is compact JSON, nil if there is none.
func parseEnvelope(data []byte) (kind string, content []byte, err error) {
	err = readObject(data, func(name, value []byte) error {
		switch string(name) {
		case "type":
			kind, _ = jsonString(value)
		case "content":
			content = value
		}
		return nil
	})
	return kind, content, err
}

// eachMember calls visit for each member of a JSON object, in order, until visit returns an
// error. A map would hide names that are given twice. The object must be valid and compact,
// as json.Compact leaves it.
func eachMember(object []byte, visit func(name, value []byte) error) error {
	if len(object) == 0 || object[0] != '{' {
		return errors.New("not a JSON object")
	}
	for rest := object[1:]; rest[0] != '}'; {
		size := valueSize(rest)
		name := rest[:size]
		rest = rest[size+len(":"):]
		if bytes.IndexByte(name, '\\') < 0 {
			name = name[1 : len(name)-1]
		} else if decoded, ok := jsonString(name); ok {
			name = []byte(decoded)
		}
		size = valueSize(rest)
		if err := visit(name, rest[:size]); err != nil {
			return err
		}
		rest = bytes.TrimPrefix(rest[size:], []byte(","))
	}
	return nil
}

// eachElement calls visit for each element of a JSON array, like eachMember.
func eachElement(array []byte, visit func(value []byte) error) error {
	if len(array) == 0 || array[0] != '[' {
		return errors.New("not a JSON array")
	}
	for rest := array[1:]; rest[0] != ']'; {
		size := valueSize(rest)
		if err := visit(rest[:size]); err != nil {
			return err
		}
		rest = bytes.TrimPrefix(rest[size:], []byte(","))
	}
	return nil
}

// valueSize returns how many bytes the JSON value at the beginning of data takes.
// The data must be valid and compact.
func valueSize(data []byte) int {
	depth := 0
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '"':
			for i++; data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
		case '}', ']':
			depth--
			if depth < 0 {
				return i // the end of what the value is in
			}
		case ',', ':':
			if depth == 0 {
				return i
			}
		}
	}
	return len(data)
}

// jsonString decodes a JSON string, and reports whether value is one.
func jsonString(value []byte) (string, bool) {
	if len(value) < 2 || value[0] != '"' {
		return "", false
	}
	if bytes.IndexByte(value, '\\') < 0 {
		return string(value[1 : len(value)-1]), true
	}
	var text string
	err := json.Unmarshal(value, &text)
	return text, err == nil
}

func jsonNumber(name, value []byte) (float64, error) {
	n, err := strconv.ParseFloat(string(value), 64)
	if err != nil {
		return 0, fmt.Errorf("%s is not a number of seconds", name)
	}
	return n, nil
}

// ---- Hub ----
//
// The map from repo ID to subscriptions, and the periodic work on them: updates that are sent
// again, tokens that run out, pings, silence. Only its methods touch the map. It parses
// nothing. Who holds its lock logs nothing and writes to no socket: batch.flush does so after it,
// or another goroutine. hub.mu is held for about a millisecond at a time at most, except for a
// library with many subscribers (to queue an event for 10,000 takes some milliseconds) and for a
// client with many thousands of subscriptions that run out at once. hub.tick runs in the main loop.

const (
	repeatAfter    = 2500 * time.Millisecond // see repeatFirst
	rememberFor    = 90 * time.Second        // a client returns after 60 s, see welcome
	maxRemembered  = 100_000                 // libraries
	maxRepeats     = 100_000                 // that wait
	sweepInterval  = time.Second
	sweepBatch     = 1000                    // clients or subscriptions looked at in one go
	removeBatch    = 250                     // subscriptions ended in one go
	awayAfter      = 5 * time.Second         // between two sweeps: the process was stopped
	pingAfter      = 20 * time.Second        // of silence; proxies cut at 50–60 s
	unansweredMax  = 2                       // pings
	stalledAfter   = 20 * time.Second        // without 16 KiB written to a slow client
	idleLimit      = 2 * time.Minute         // without a subscription
	idleLimitFull  = 10 * time.Second        // for strangers, while places are scarce
	maxIdleClosed  = 2000                    // clients in one sweep, so that events need not wait
	renewalWarning = 10                      // seconds before a token's end
	remindAfter    = 20 * time.Second        // without a renewal, until jwt-expired is sent again
	keepFor        = 60 * time.Second        // after a token's end, see renewal
	maxWaiting     = 1024                    // events of one library that wait for members
	maxWaitingAll  = 8192                    // of all libraries
	maxWaitingSize = 64 << 20                // bytes of them
	drainTime      = 2800 * time.Millisecond // over which clients are closed at the end
)

// A hub knows who has subscribed to what.
type hub struct {
	clock   clock
	log     *logger
	metrics *metrics
	places  int // for clients

	// For the goroutine that calls tick:
	swept   time.Duration // uptime of the last sweep
	resumed time.Duration // uptime of the first sweep after the process had been stopped
	idle    int           // clients that this sweep has closed as idle

	mu                  sync.Mutex // guards all below, and what says so in client
	libraries           map[string]*library
	clients             []*client // in no order; each knows its index
	subscriptions       int
	subscribedLibraries int // those with a subscription

	updates *list.List // of *library: those with a remembered update, the oldest first
	repeats []repeat   // the first is due first

	waiting     int // events that wait for group members
	waitingSize int // bytes of them
}

// A library is one that somebody has subscribed to, or that changed lately.
type library struct {
	id            string // repo ID
	subscriptions map[*client]*subscription
	newest        *message      // the remembered update, nil for none
	updated       time.Duration // uptime at which it was sent
	element       *list.Element // of hub.updates, nil for none
	waiting       []*event      // an event for a group, and all that came after it
}

// A subscription is one client's to one library. The user belongs to it and not to the
// client: a desktop client can carry several accounts.
type subscription struct {
	client  *client
	library *library
	index   int // in client.subscriptions
	user    string
	expires float64  // Unix time in seconds
	due     float64  // Unix time at which sweep has to look at it
	renewal *renewal // nil until jwt-expired was sent, or the token ran out
}

// A renewal begins when jwt-expired is sent or the token runs out, and ends with the new
// subscription, or when the old one is dropped. Meanwhile the desktop client ignores every event
// of the library (measured), so they are kept for it:
//
//	10 s before the token's end   jwt-expired is sent; events are sent, and kept
//	10 s after it                 jwt-expired is sent again
//	from the end on               events are kept only
//	60 s after it                 what was kept is forgotten; if anything was or comes, the
//	                              client is closed when it renews
//
// Three begin one: checkToken; sendOrKeep, with an event after the end and before the sweep; and
// expire, when the token may be good for days.
type renewal struct {
	sent     bool          // jwt-expired
	sentAt   time.Duration // uptime
	reminded bool          // jwt-expired was sent again
	ended    bool          // the token has run out
	endedAt  time.Duration // uptime
	kept     []*message
	late     bool // the token ran out long ago: nothing is kept any more
	missed   bool // something came that is not kept
}

// A repeat is an update that is to be sent again: to one subscription, or to the library's desktop
// clients.
type repeat struct {
	update *message
	to     *subscription // nil for all
	at     time.Duration // uptime
}

// newHub returns a hub without clients. places is how many there can be.
func newHub(clk clock, lg *logger, m *metrics, places int) *hub {
	return &hub{
		clock:     clk,
		log:       lg,
		metrics:   m,
		places:    places,
		libraries: map[string]*library{},
		updates:   list.New(),
		swept:     clk.uptime(),
	}
}

// add makes c known. It has no subscription yet.
func (h *hub) add(c *client) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.index = len(h.clients)
	c.idleSince = h.clock.uptime()
	c.due = math.Inf(1)
	h.clients = append(h.clients, c)
}

// remove forgets c and its subscriptions. A client can have thousands of them, so it locks
// the hub for some at a time.
func (h *hub) remove(c *client) {
	for h.removeSome(c, removeBatch) {
	}
}

// removeSome forgets at most n subscriptions of c, then c, and reports whether there is
// more to forget.
func (h *hub) removeSome(c *client, n int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ; n > 0 && len(c.subscriptions) > 0; n-- {
		h.drop(c.subscriptions[len(c.subscriptions)-1])
	}
	if len(c.subscriptions) > 0 {
		return true
	}
	last := h.clients[len(h.clients)-1]
	h.clients[c.index], last.index = last, c.index
	h.clients[len(h.clients)-1] = nil
	h.clients = h.clients[:len(h.clients)-1]
	return false
}

// subscribe lets c have the events of the library that cl names, or renews its
// subscription. It reports false if jwt-expired was sent and the token ends no later than the old
// one: the client has to fetch another.
func (h *hub) subscribe(c *client, cl claims) bool {
	b := batch{log: h.log}
	defer b.flush()
	h.mu.Lock()
	defer h.mu.Unlock()
	lib := h.ensureLibrary(cl.repoID)
	sub := lib.subscriptions[c]
	listensAnew := sub == nil || sub.renewal != nil
	hasUpdate := false // the newest update is among what was kept
	switch {
	case sub == nil:
		sub = h.addSubscription(c, lib)
	case sub.renewal != nil:
		endTold := sub.expires <= h.clock.unix()+renewalWarning
		if endTold && cl.expires <= sub.expires {
			return false
		}
		if sub.renewal.missed {
			b.queue(c, closeFrame(statusRestart, "renewal-missed",
				"too much came until the token was renewed, or it came too late"))
		}
		for _, m := range sub.renewal.kept {
			hasUpdate = hasUpdate || m.isUpdate()
			b.queueFor(sub, m.copyAcceptedAt(h.clock.uptime()))
		}
		h.endRenewal(sub)
	}
	sub.user = cl.username
	sub.expires = cl.expires
	sub.due = h.warningTime(cl.expires)
	c.due = min(c.due, sub.due)
	if listensAnew && c.desktop {
		h.welcome(&b, sub, hasUpdate)
	}
	return true
}

// expire notes that jwt-expired is sent to c since it came with a bad token. Even if its old token
// is still good, it ignores the library until it subscribes anew.
func (h *hub) expire(c *client, repoID string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	lib := h.libraries[repoID]
	if lib == nil || lib.subscriptions[c] == nil {
		return
	}
	if sub := lib.subscriptions[c]; sub.renewal == nil {
		sub.renewal = &renewal{sent: true, sentAt: h.clock.uptime()}
		reminder := h.clock.unix() + (remindAfter + sweepInterval).Seconds()
		sub.due = min(sub.due, reminder)
		c.due = min(c.due, sub.due)
	}
}

// warningTime is when jwt-expired is sent, in Unix seconds: 10 s before the token's end, so that the
// client has renewed it by then; but not within the next 50 s: of a token that ends sooner at its
// end.
func (h *hub) warningTime(expires float64) float64 {
	return max(expires-renewalWarning, min(expires, h.clock.unix()+50))
}

// welcome sends the library's newest update to a new desktop subscription, if it is not older
// than 90 s, and again 2.5 s later: the client was away when it came, or has just begun to
// sync. mu must be held.
func (h *hub) welcome(b *batch, sub *subscription, hasUpdate bool) {
	uptime := h.clock.uptime()
	m := sub.library.newest
	if m == nil || uptime-sub.library.updated >= rememberFor {
		return
	}
	if !hasUpdate {
		b.queueFor(sub, m.copyAcceptedAt(uptime))
	}
	h.repeatLater(b, m, sub)
}

// repeatLater notes that an update is to be sent again, to one subscription, or to all desktop
// clients if to is nil. mu must be held.
func (h *hub) repeatLater(b *batch, m *message, to *subscription) {
	h.repeats = append(h.repeats, repeat{m, to, h.clock.uptime() + repeatAfter})
	if len(h.repeats) > maxRepeats {
		h.repeatFirst(b) // early: better than not at all
	}
}

// unsubscribe ends c's subscription to the library repoID, if it has one.
func (h *hub) unsubscribe(c *client, repoID string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if lib := h.libraries[repoID]; lib != nil {
		if sub := lib.subscriptions[c]; sub != nil {
			h.drop(sub)
		}
	}
}

// ensureLibrary returns the library repoID, a new one if it is not known. mu must be held.
func (h *hub) ensureLibrary(repoID string) *library {
	lib := h.libraries[repoID]
	if lib == nil {
		lib = &library{id: repoID}
		h.libraries[repoID] = lib
	}
	return lib
}

// addSubscription makes a subscription of c to lib. mu must be held.
func (h *hub) addSubscription(c *client, lib *library) *subscription {
	sub := &subscription{client: c, library: lib, index: len(c.subscriptions)}
	if lib.subscriptions == nil {
		lib.subscriptions = map[*client]*subscription{}
	}
	if len(lib.subscriptions) == 0 {
		h.subscribedLibraries++
	}
	lib.subscriptions[c] = sub
	c.subscriptions = append(c.subscriptions, sub)
	h.subscriptions++
	return sub
}

// drop ends a subscription. mu must be held.
func (h *hub) drop(sub *subscription) {
	c, lib := sub.client, sub.library
	h.endRenewal(sub)
	delete(lib.subscriptions, c)
	last := c.subscriptions[len(c.subscriptions)-1]
	c.subscriptions[sub.index], last.index = last, sub.index
	c.subscriptions[len(c.subscriptions)-1] = nil
	c.subscriptions = c.subscriptions[:len(c.subscriptions)-1]
	c.idleSince = h.clock.uptime() // counts if none is left
	h.subscriptions--
	if len(lib.subscriptions) == 0 {
		lib.subscriptions = nil
		h.subscribedLibraries--
		h.dropWaiting(lib) // nobody is there to get it
	}
	h.forgetUnused(lib)
}

// forgetUnused removes lib from the map when nothing needs it. mu must be held.
func (h *hub) forgetUnused(lib *library) {
	if len(lib.subscriptions) == 0 && lib.newest == nil && len(lib.waiting) == 0 {
		delete(h.libraries, lib.id)
	}
}

// publish queues ev for each subscriber entitled to it, and returns their number. Events of
// one library come into every outbox in the order in which they were published; a newer
// update replaces one that still waits there. If ev waits for the members of a group, the
// caller must find them and call resolve; all subscribers of the library are counted then.
func (h *hub) publish(ev *event) (subscribers int, waits bool) {
	b := batch{log: h.log}
	defer b.flush()
	h.mu.Lock()
	defer h.mu.Unlock()
	ev.message.accepted = h.clock.uptime()
	lib := h.libraries[ev.repoID]
	switch {
	case lib == nil || len(lib.subscriptions) == 0:
		if ev.message.isUpdate() {
			h.remember(h.ensureLibrary(ev.repoID), ev.message)
		}
		return 0, false
	case ev.forGroup || len(lib.waiting) > 0:
		return h.queueWaiting(&b, lib, ev)
	}
	return h.deliver(&b, lib, ev), false
}

// deliver queues ev for the subscriptions of lib that it is for, and returns how many
// they are. mu must be held.
func (h *hub) deliver(b *batch, lib *library, ev *event) (n int) {
	now := h.clock.unix()
	for _, sub := range lib.subscriptions {
		if ev.isFor(sub.user) && h.sendOrKeep(b, sub, ev.message, now) {
			n++
		}
	}
	if ev.message.isUpdate() {
		h.remember(lib, ev.message)
		if lib.newest == ev.message {
			h.repeatLater(b, ev.message, nil)
		}
	}
	return n
}

// sendOrKeep queues m for one subscription, or keeps it during a renewal, or both, and reports
// whether it was queued. now is Unix time. mu must be held.
func (h *hub) sendOrKeep(b *batch, sub *subscription, m *message, now float64) bool {
	expired := sub.expires <= now
	if expired && sub.renewal == nil {
		sub.renewal = &renewal{} // the next sweep sends jwt-expired
	}
	if sub.renewal != nil {
		h.keep(sub, m)
	}
	return !expired && b.queueFor(sub, m)
}

// keep keeps m until the subscription is renewed. For a client as many are kept as fit its outbox,
// less one: welcome may add an update. Of updates only the newest matters. mu must be held.
func (h *hub) keep(sub *subscription, m *message) {
	r, c := sub.renewal, sub.client
	if m.isUpdate() {
		if i := slices.IndexFunc(r.kept, (*message).isUpdate); i >= 0 {
			c.kept--
			c.keptSize -= len(r.kept[i].frame)
			r.kept = slices.Delete(r.kept, i, i+1)
		}
	}
	if r.late || c.kept >= maxOutbox-1 || c.keptSize+len(m.frame) > maxOutboxSize {
		r.missed = true
		h.forgetKept(sub)
	}
	if r.missed {
		return
	}
	r.kept = append(r.kept, m)
	c.kept++
	c.keptSize += len(m.frame)
}

// forgetKept forgets what was kept. mu must be held.
func (h *hub) forgetKept(sub *subscription) {
	for _, m := range sub.renewal.kept {
		sub.client.kept--
		sub.client.keptSize -= len(m.frame)
	}
	sub.renewal.kept = nil
}

// endRenewal ends a renewal, if there is one. mu must be held.
func (h *hub) endRenewal(sub *subscription) {
	if sub.renewal == nil {
		return
	}
	h.forgetKept(sub)
	if sub.renewal.late {
		sub.client.late--
	}
	sub.renewal = nil
}

// remember remembers an update for clients that subscribe later, see welcome. mu must be held.
func (h *hub) remember(lib *library, m *message) {
	if len(m.payload()) > desktopSize {
		h.forgetUpdate(lib) // no desktop client could read the new one
		return
	}
	lib.newest = m
	lib.updated = h.clock.uptime()
	if lib.element == nil {
		lib.element = h.updates.PushBack(lib)
	} else {
		h.updates.MoveToBack(lib.element)
	}
	if h.updates.Len() > maxRemembered {
		h.forgetUpdate(h.oldestUpdate())
	}
}

// forgetUpdate forgets the remembered update of lib, if there is one. mu must be held.
func (h *hub) forgetUpdate(lib *library) {
	if lib.element != nil {
		h.updates.Remove(lib.element)
		lib.element = nil
		lib.newest = nil
	}
	h.forgetUnused(lib)
}

// oldestUpdate returns the library whose remembered update is the oldest, nil if there is none.
// mu must be held.
func (h *hub) oldestUpdate() *library {
	if oldest := h.updates.Front(); oldest != nil {
		return oldest.Value.(*library)
	}
	return nil
}

// queueWaiting queues ev behind the events of its library that wait for group members, or as
// the first of them. When too many wait, those of this library are dropped, and its clients are
// closed. mu must be held.
func (h *hub) queueWaiting(b *batch, lib *library, ev *event) (subscribers int, waits bool) {
	size := len(ev.message.frame)
	if len(lib.waiting) >= maxWaiting || h.waiting >= maxWaitingAll ||
		h.waitingSize+size > maxWaitingSize {
		h.dropWaiting(lib)
		if ev.message.isUpdate() {
			h.remember(lib, ev.message)
		}
		n := h.closeSubscribers(b, lib, "too many events wait for group members")
		h.forgetUnused(lib)
		b.warnOnce("waiting", "too many events wait for seaf-server to tell who is in a group: "+
			"%d clients of library %q are closed so that they resync", n, lib.id)
		return 0, false
	}
	lib.waiting = append(lib.waiting, ev)
	h.waiting++
	h.waitingSize += size
	return len(lib.subscriptions), ev.forGroup
}

// takeWaiting takes the first of the waiting events of lib. mu must be held.
func (h *hub) takeWaiting(lib *library) *event {
	ev := lib.waiting[0]
	lib.waiting[0] = nil
	lib.waiting = lib.waiting[1:]
	h.waiting--
	h.waitingSize -= len(ev.message.frame)
	return ev
}

// resolve records the members of ev.group, or why they are not known. It delivers ev, when it
// is its turn, and what waits behind it. If the members are not known, nobody gets ev, and the
// library's clients are closed so that they resync.
func (h *hub) resolve(ev *event, members map[string]bool, failure error) {
	h.mu.Lock()
	ev.resolved = true
	ev.members = members
	ev.failure = failure
	h.mu.Unlock()
	for h.deliverWaiting(ev.repoID) {
	}
}

// deliverWaiting delivers the first of a library's waiting events if its group is known, and
// reports whether another one may follow. After a bug the next one is tried.
func (h *hub) deliverWaiting(repoID string) (more bool) {
	defer recoverPanic(h.log, "delivering what waited for group members")
	b := batch{log: h.log}
	defer b.flush()
	h.mu.Lock()
	defer h.mu.Unlock()
	lib := h.libraries[repoID]
	if lib == nil || len(lib.waiting) == 0 {
		return false
	}
	if first := lib.waiting[0]; first.forGroup && !first.resolved {
		return false
	}
	ev := h.takeWaiting(lib)
	more = true
	if ev.failure != nil {
		n := h.closeSubscribers(&b, lib, "group members are not known")
		b.warnOnce("group members: "+failureKind(ev.failure),
			"the members of group %d are not known, so nobody gets an event for them, "+
				"and %d clients of library %q are closed so that they resync: %v",
			ev.group, n, lib.id, ev.failure)
	} else {
		h.deliver(&b, lib, ev)
	}
	h.forgetUnused(lib)
	return more
}

// dropWaiting drops the events of lib that wait. Updates among them are remembered. mu must
// be held.
func (h *hub) dropWaiting(lib *library) {
	for len(lib.waiting) > 0 {
		if ev := h.takeWaiting(lib); ev.message.isUpdate() {
			h.remember(lib, ev.message)
		}
	}
}

// closeSubscribers closes all clients that listen to lib, with text as the reason, and returns
// their number. mu must be held.
func (h *hub) closeSubscribers(b *batch, lib *library, text string) int {
	m := closeFrame(statusRestart, "resync", text)
	n := 0
	for c, sub := range lib.subscriptions {
		if r := sub.renewal; r != nil && r.late {
			r.missed = true // it is closed when it renews
			continue
		}
		b.queue(c, m)
		n++
	}
	return n
}

// tick does the periodic work, and reports whether it met no bug. It is called every 100 ms.
func (h *hub) tick() (healthy bool) {
	defer recoverPanic(h.log, "the hub's tick")
	for h.repeatSome() {
	}
	if h.clock.uptime()-h.swept >= sweepInterval {
		h.sweep()
	}
	return true
}

// repeatSome sends updates again that are due, until about sweepBatch subscriptions were served (a
// library is not split), and forgets old ones. It reports whether more are due.
func (h *hub) repeatSome() bool {
	b := batch{log: h.log}
	defer b.flush()
	h.mu.Lock()
	defer h.mu.Unlock()
	uptime := h.clock.uptime()
	for sent := 0; sent < sweepBatch && h.repeatIsDue(uptime); {
		sent += 1 + h.repeatFirst(&b)
	}
	for range sweepBatch {
		oldest := h.oldestUpdate()
		if oldest == nil || uptime-oldest.updated < rememberFor {
			break
		}
		h.forgetUpdate(oldest)
	}
	return h.repeatIsDue(uptime)
}

// repeatIsDue reports whether an update is to be sent again. mu must be held.
func (h *hub) repeatIsDue(uptime time.Duration) bool {
	return len(h.repeats) > 0 && h.repeats[0].at <= uptime
}

// repeatFirst sends the first update of repeats again, unless a newer one came, and returns to how
// many. The desktop client forgets an update that arrives 1.0 to 1.6 s after a download
// (measured). mu must be held.
func (h *hub) repeatFirst(b *batch) (sent int) {
	r := h.repeats[0]
	h.repeats[0] = repeat{}
	h.repeats = h.repeats[1:]
	lib := h.libraries[r.update.updateOf]
	if lib == nil || lib.newest != nil && lib.newest != r.update {
		return 0 // a newer one came; without newest, this one was forgotten, which is no reason
	}
	again, now := r.update.copyAcceptedAt(h.clock.uptime()), h.clock.unix()
	if r.to != nil {
		if lib.subscriptions[r.to.client] == r.to {
			h.sendOrKeep(b, r.to, again, now)
		}
		return 1
	}
	for c, sub := range lib.subscriptions {
		if c.desktop {
			h.sendOrKeep(b, sub, again, now)
			sent++
		}
	}
	return sent
}

// sweep looks at each client: it pings, closes, and sends jwt-expired. It looks at some at a
// time, from the last to the first. So none is missed when meanwhile clients come at the
// end, and when the last one takes the place of one that left.
func (h *hub) sweep() {
	uptime := h.clock.uptime()
	if uptime-h.swept >= awayAfter {
		h.resumed = uptime
	}
	h.swept = uptime
	h.idle = 0
	for next := math.MaxInt; next > 0; {
		next = h.sweepSome(next)
	}
}

// sweepSome looks at clients below index end, until it has looked at sweepBatch of them or of their
// subscriptions (a client is not split), and returns the index below which it has not looked.
func (h *hub) sweepSome(end int) int {
	b := batch{log: h.log}
	defer b.flush()
	h.mu.Lock()
	defer h.mu.Unlock()
	uptime, now := h.clock.uptime(), h.clock.unix()
	end = min(end, len(h.clients))
	for looked := 0; looked < sweepBatch && end > 0; looked++ {
		end--
		c := h.clients[end]
		h.pingOrClose(&b, c, uptime)
		if c.due <= now {
			looked += len(c.subscriptions)
			h.checkTokens(&b, c, uptime, now)
		}
	}
	return end
}

// pingOrClose pings c, or closes it if it was silent or idle for too long. All is counted from
// when the process last resumed, because what a client sent while it was stopped was not read
// yet. mu must be held.
func (h *hub) pingOrClose(b *batch, c *client, uptime time.Duration) {
	heard := time.Duration(c.heard.Load())
	if heard >= c.pinged || c.pinged < h.resumed {
		c.unanswered = 0
	}
	limit := idleLimit
	if len(h.clients) > h.places/2 && c.isStranger() {
		limit = idleLimitFull
	}
	idle := len(c.subscriptions) == c.late && uptime-max(c.idleSince, h.resumed) >= limit
	switch {
	case c.stalledSince(h.resumed, uptime, stalledAfter):
		b.later = append(b.later, func() { c.abort("stalled") })
	case idle && h.idle < maxIdleClosed:
		m := closeFrame(statusPolicy, "idle", fmt.Sprintf("no subscription for %v", limit))
		if b.queue(c, m) { // it is not being closed already
			h.idle++
		}
	case uptime-max(heard, c.pinged) < pingAfter:
	case c.unanswered >= unansweredMax:
		b.queue(c, closeFrame(statusPolicy, "silent", "no frame for 60 s"))
	default:
		c.pinged = uptime
		c.unanswered++
		b.queue(c, pingFrame)
	}
}

// checkTokens looks at the subscriptions of c that are due at now, in Unix seconds. It sends
// jwt-expired before the end of a token, and once more if it was not renewed: at most half an
// outbox of messages, because a client with thousands of subscriptions would overflow it; the
// others follow with the next sweep. mu must be held.
func (h *hub) checkTokens(b *batch, c *client, uptime time.Duration, now float64) {
	sent := 0
	c.due = math.Inf(1)
	for _, sub := range c.subscriptions {
		if sub.due <= now && sent < maxOutbox/2 && h.checkToken(b, sub, uptime, now) {
			sent++
		}
		c.due = min(c.due, sub.due)
	}
}

// checkToken begins a renewal or goes on with it, and reports whether it sent jwt-expired. The
// subscription is due. mu must be held.
func (h *hub) checkToken(b *batch, sub *subscription, uptime time.Duration, now float64) bool {
	if sub.renewal == nil {
		sub.renewal = &renewal{}
	}
	r := sub.renewal
	// How far is the token? Before its end, look again at the end. From the end on due stays in
	// the past, so that each sweep looks, until giveUp.
	switch {
	case r.ended && uptime-r.endedAt >= keepFor:
		h.giveUp(sub)
		return false
	case r.ended:
	case sub.expires <= now:
		r.ended = true
		r.endedAt = uptime
	default:
		sub.due = sub.expires
	}
	// Is jwt-expired to be sent: the first, or the reminder?
	switch {
	case !r.sent:
		r.sent = true
		r.sentAt = uptime
	case !r.reminded && uptime-r.sentAt >= remindAfter:
		r.reminded = true
	default:
		return false
	}
	b.queueFor(sub, expiredFrame(sub.library.id))
	return true
}

// giveUp stops keeping events for a subscription whose token was not renewed. mu must be held.
func (h *hub) giveUp(sub *subscription) {
	r, c := sub.renewal, sub.client
	r.late = true
	r.missed = r.missed || len(r.kept) > 0
	h.forgetKept(sub)
	sub.due = math.Inf(1)
	c.late++
	c.idleSince = h.clock.uptime()
}

// closeAll closes all clients, spread over drainTime since all of them come back
// together, and waits for the closing handshakes.
func (h *hub) closeAll() {
	clients := h.allClients()
	goingAway := closeFrame(statusGoingAway, "shutdown", "the server is restarted")
	start := time.Now()
	gap := min(time.Millisecond, drainTime/time.Duration(len(clients)+1))
	for i, c := range clients {
		time.Sleep(time.Until(start.Add(time.Duration(i) * gap)))
		c.send(goingAway)
	}
	for _, c := range h.allClients() { // also those that were just being accepted
		c.send(goingAway)
	}
	end := time.Now().Add(closeWait)
	for h.gauges().connections > 0 && time.Now().Before(end) {
		time.Sleep(2 * time.Millisecond)
	}
}

func (h *hub) allClients() []*client {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.clients)
}

// gauges returns the figures of this moment.
func (h *hub) gauges() gauges {
	h.mu.Lock()
	defer h.mu.Unlock()
	return gauges{
		connections:   len(h.clients),
		subscriptions: h.subscriptions,
		libraries:     h.subscribedLibraries,
		waiting:       h.waiting,
		remembered:    h.updates.Len(),
	}
}

// A batch is what is left to do when the hub is unlocked. Its flush is deferred before the
// lock is taken, and so runs after the lock is released.
type batch struct {
	log     *logger
	clients []*client // whose outboxes were empty, and that nobody writes to yet
	later   []func()  // the rest: lines of the log, and sockets to close
}

// warnOnce is logger.warnOnce, when the hub is unlocked.
func (b *batch) warnOnce(key, format string, args ...any) {
	b.later = append(b.later, func() { b.log.warnOnce(key, format, args...) })
}

const (
	// Writing to the first clients while others are still queued serves the last of 10,000
	// in half the time.
	batchSize = 256
	// Up to this many clients are written to by the goroutine that flushes: the writes do
	// not wait, and another goroutine would cost more.
	smallBatch = 16
)

// queue puts m into the outbox of c, and reports whether it was taken.
func (b *batch) queue(c *client, m *message) bool {
	taken, mustWrite := c.enqueue(m)
	if mustWrite {
		b.clients = append(b.clients, c)
	}
	if len(b.clients) == batchSize {
		go writeAll(b.clients)
		b.clients = nil
	}
	return taken
}

// queueFor is queue with a line for the debug log.
func (b *batch) queueFor(sub *subscription, m *message) bool {
	taken := b.queue(sub.client, m)
	if taken && b.log.debugEnabled() {
		name, user := sub.client.name, sub.user // a renewal may change the user
		b.later = append(b.later, func() {
			b.log.debugf("to %s, user %q: %s", name, user, m.payload())
		})
	}
	return taken
}

// flush writes what was queued, or starts a goroutine that does. It waits for no client.
func (b *batch) flush() {
	for _, do := range b.later {
		do()
	}
	if len(b.clients) <= smallBatch {
		writeAll(b.clients)
		return
	}
	go writeAll(b.clients)
}

// ---- Client ----
//
// One WebSocket connection: the outbox of what waits to be written, the reading of
// frames, the closing handshake (RFC 6455). It does not know the map: it calls
// hub.subscribe, expire, unsubscribe and remove, and its handler for what clients share: the check
// of tokens, turns, slots, and their number. client.mu guards the outbox; nobody holds it while
// writing. client.serve and the goroutine that it starts for frames read. Whoever puts a message
// into an empty outbox has it written until it is empty again: there is one writer at a time.
//
// What holds back a stranger, a client that has not shown a good token yet:
//
//	outbox   8 messages, 2 KiB                              client.isFull
//	turn     for each frame: as many as half the processors client.inTurn
//	slot     for a message beyond 2 KiB: 8, for 3 s each    client.takeSlot
//	time     10 s while places are scarce                   hub.pingOrClose
//
// Reading has a deadline for a message in fragments (20 s), for a stranger's long one (3 s), and for
// the client's close frame (1 s). Else silence is ended by hub.pingOrClose.

const (
	subprotocol     = "notification.seafile.com" // the desktop client fails on any other
	desktopSize     = 4096                       // bytes of a message that the desktop client parses
	maxMessage      = 1 << 20                    // bytes of a client's message, and of an event
	maxStranger     = 64 << 10                   // bytes of a stranger's message
	longStranger    = 2 << 10                    // bytes beyond which such a message needs a slot
	maxSlotWait     = 1000                       // that wait for a slot
	maxSlots        = 8                          // strangers that send a long message at a time
	strangerOutbox  = 8                          // messages in a stranger's outbox
	strangerOutSize = 2 << 10                    // bytes of them
	maxRepoID       = 256                        // bytes; Seafile's have 36
	maxOutbox       = 1024                       // messages
	maxOutboxSize   = maxMessage + 64<<10        // bytes: a largest event behind some small messages
	maxRefused      = 1000                       // subscriptions in a row, until the client is closed
	readBuffer      = 512                        // bytes; a desktop client's subscribe has 323
	writeChunk      = 16 << 10                   // bytes of one write to a slow client
	sendBuffer      = 64 << 10                   // bytes in the kernel; see Hijack
	closeWait       = time.Second                // for the client's half of the closing handshake
	slotWait        = 20 * time.Second           // for a slot
	slotTime        = 3 * time.Second            // for a long message of a stranger to come whole
	messageTime     = 20 * time.Second           // for a message in fragments to come whole
)

// Opcodes of RFC 6455, section 5.2.
const (
	opContinuation = 0
	opText         = 1
	opBinary       = 2
	opClose        = 8
	opPing         = 9
	opPong         = 10
)

// Close statuses of RFC 6455, section 7.4.1, and of the IANA registry.
const (
	statusNone      = 0 // a close frame without a status
	statusGoingAway = 1001
	statusProtocol  = 1002
	statusInvalid   = 1007
	statusPolicy    = 1008
	statusTooBig    = 1009
	statusInternal  = 1011
	statusRestart   = 1012 // Service Restart: come back and resync
	statusTryLater  = 1013
)

// A message is a frame on its way to one client or many. Once queued it is not changed.
type message struct {
	frame       []byte        // header and payload
	header      int           // bytes of the header
	updateOf    string        // of a repo-update: its repo ID
	closeReason string        // of a close frame: for the metrics
	accepted    time.Duration // uptime at which the event came, 0 for what is no event
}

func (m *message) isUpdate() bool { return m.updateOf != "" }

func (m *message) payload() []byte { return m.frame[m.header:] }

// copyAcceptedAt returns a copy of an event that is sent again at the given uptime.
func (m *message) copyAcceptedAt(uptime time.Duration) *message {
	again := *m
	again.accepted = uptime
	return &again
}

// newMessage makes one whole, unmasked frame (RFC 6455, section 5.2).
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
	return &message{frame: append(f, payload...), header: len(f)}
}

var (
	pingFrame = newMessage(opPing, nil)
	pongFrame = newMessage(opPong, nil)
)

// expiredFrame tells that the token for a library does not hold, or not any more.
func expiredFrame(repoID string) *message {
	id, _ := json.Marshal(repoID)
	return newMessage(opText, fmt.Appendf(nil, `{"type":"jwt-expired","content":{"repo_id":%s}}`, id))
}

// closeFrame ends a connection. The reason is for the metrics, the text for the client: a
// control frame has room for 123 bytes of it.
func closeFrame(status int, reason, text string) *message {
	var payload []byte
	if status != statusNone {
		payload = binary.BigEndian.AppendUint16(payload, uint16(status))
		payload = append(payload, strings.ToValidUTF8(text[:min(len(text), 123)], "")...)
	}
	m := newMessage(opClose, payload)
	m.closeReason = reason
	return m
}

// A client is one WebSocket connection.
type client struct {
	hub     *hub
	handler *handler
	conn    net.Conn
	raw     syscall.RawConn // of conn
	name    string          // for the log: its address and what it says of itself
	desktop bool            // it speaks the subprotocol
	isCheck bool            // it is a self-check's

	heard   atomic.Int64 // uptime of the last frame
	trusted atomic.Bool  // it had a token of ours; until then it is a stranger

	mu sync.Mutex // guards down to drained
	// Either the outbox is empty and nobody writes, or one goroutine is its writer: that to which
	// enqueue said mustWrite, or the writeRest to which it handed over. It ends when advance
	// returns nil, also after abort has emptied the outbox.
	outbox       []*message    // the first is being written
	outboxSize   int           // bytes in it
	written      int           // bytes of the first
	writingSince time.Duration // uptime of the last progress, 0 if the outbox is empty
	closing      string        // why it is being closed; no message follows a close frame
	drained      chan struct{} // made with the close frame, closed when the outbox is empty

	// For serve and readFrames, of which one runs at a time:
	reader       *bufio.Reader
	nextFrame    func() (frameReader, error)
	fragments    bytes.Buffer // of a message, so far
	opcode       byte         // of the message of which they are, 0 between messages
	hasSlot      bool         // of handler.slots
	refusedInRow int          // subscriptions

	// Guarded by hub.mu:
	index         int // in hub.clients
	subscriptions []*subscription
	due           float64       // Unix time, the first of its subscriptions
	late          int           // of subscriptions, those that are given up
	idleSince     time.Duration // uptime at which it had no other subscription any more
	pinged        time.Duration // uptime of our last ping
	unanswered    int           // pings
	kept          int           // messages kept for renewals
	keptSize      int           // bytes of them
}

// A frameReader is a frame as x/net/websocket reads it: the payload, unmasked.
type frameReader interface {
	io.Reader
	HeaderReader() io.Reader
}

// enqueue puts m into the outbox. It reports whether m was taken, and whether the caller must
// write. A client that cannot take m is closed instead: it must not miss m without knowing.
func (c *client) enqueue(m *message) (taken, mustWrite bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing != "" {
		return false, false
	}
	if m.isUpdate() {
		c.dropOlderUpdates(m.updateOf)
	}
	admitted := c.admit(m)
	if admitted.closeReason != "" {
		c.closing = admitted.closeReason
		c.drained = make(chan struct{})
		c.conn.SetReadDeadline(time.Now().Add(closeWait))
	}
	mustWrite = len(c.outbox) == 0
	if mustWrite {
		c.writingSince = c.hub.clock.uptime()
	}
	c.outbox = append(c.outbox, admitted)
	c.outboxSize += len(admitted.frame)
	return admitted == m, mustWrite
}

// admit returns m, or the close frame to send in its place: m is too long for the client, or
// the client is too slow for m. mu must be held.
func (c *client) admit(m *message) *message {
	switch {
	case m.closeReason != "":
		return m
	case c.desktop && len(m.payload()) > desktopSize:
		return closeFrame(statusRestart, "too-long", "an event is too long for this client")
	case c.isFull(len(m.frame)):
		// The first may be halfway out. The size does not matter any more.
		c.outbox = c.outbox[:min(1, len(c.outbox))]
		return closeFrame(statusTryLater, outboxFull, "too slow")
	}
	return m
}

// isFull reports whether the outbox has no room for a frame of size bytes. mu must be held.
func (c *client) isFull(size int) bool {
	if c.isStranger() {
		return len(c.outbox) >= strangerOutbox || c.outboxSize+size > strangerOutSize
	}
	return len(c.outbox) >= maxOutbox || c.outboxSize+size > maxOutboxSize
}

// dropOlderUpdates drops the update of a library that still waits: only the newest
// matters. The first message of the outbox is on its way already. mu must be held.
func (c *client) dropOlderUpdates(repoID string) {
	for i := len(c.outbox) - 1; i > 0; i-- {
		if old := c.outbox[i]; old.updateOf == repoID {
			c.outboxSize -= len(old.frame)
			c.outbox = slices.Delete(c.outbox, i, i+1)
		}
	}
}

// send puts m into the outbox, and writes. It does not wait.
func (c *client) send(m *message) {
	if _, mustWrite := c.enqueue(m); mustWrite {
		c.writeOutbox()
	}
}

// writeAll writes to each of the clients what its socket takes at once. The caller is
// their writer (see enqueue). It waits for nobody.
func writeAll(clients []*client) {
	for _, c := range clients {
		c.writeOutbox()
	}
}

// writeOutbox writes what the socket takes at once. If that is not all, a goroutine
// writes the rest.
func (c *client) writeOutbox() {
	defer c.endOnPanic()
	for data := c.advance(0); data != nil; {
		n := 0
		c.raw.Write(func(fd uintptr) bool {
			n, _ = syscall.Write(int(fd), data) // writeRest will meet the error again
			return true                         // do not wait
		})
		rest := c.advance(max(n, 0))
		if rest != nil && n < len(data) {
			go c.writeRest()
			return
		}
		data = rest
	}
}

// writeRest writes the outbox and waits for the client as long as it must. hub.sweep ends
// it when nothing was written for too long, or client.end.
func (c *client) writeRest() {
	defer c.endOnPanic()
	for data := c.advance(0); data != nil; {
		n, err := c.conn.Write(data[:min(len(data), writeChunk)])
		if err != nil {
			c.abort("gone")
			return
		}
		data = c.advance(n)
	}
}

// advance counts n more bytes as written, and returns what is to be written next, nil if
// the outbox is empty.
func (c *client) advance(n int) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.outbox) == 0 {
		return nil
	}
	if n > 0 {
		c.countWritten(n)
	}
	if len(c.outbox) == 0 {
		c.finishWriting()
		return nil
	}
	return c.outbox[0].frame[c.written:]
}

// countWritten counts n more bytes of the first message as written. mu must be held.
func (c *client) countWritten(n int) {
	uptime := c.hub.clock.uptime()
	c.writingSince = uptime
	c.written += n
	first := c.outbox[0]
	if c.written < len(first.frame) {
		return
	}
	c.outbox = slices.Delete(c.outbox, 0, 1)
	c.outboxSize -= len(first.frame)
	c.written = 0
	if first.accepted > 0 {
		c.hub.metrics.delivered(uptime - first.accepted)
	}
}

// finishWriting notes that the outbox is empty. A small array is kept for the next message. mu
// must be held.
func (c *client) finishWriting() {
	c.writingSince = 0
	if cap(c.outbox) > 4 {
		c.outbox = nil
	}
	if c.drained != nil {
		close(c.drained)
		c.drained = nil
	}
}

// stalledSince reports whether a write has waited for limit at uptime, not counting the
// time before resumed.
func (c *client) stalledSince(resumed, uptime, limit time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.writingSince > 0 && uptime-max(c.writingSince, resumed) >= limit
}

// abort closes the socket at once, and returns why the connection ends: the first cause
// counts. The goroutine that reads notices it and ends, within slotWait at most.
func (c *client) abort(reason string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing == "" {
		c.closing = reason
	}
	c.conn.Close()
	c.outbox = nil
	c.finishWriting()
	return c.closing
}

// isClosing reports whether a close frame was sent, or waits to be, or the socket was closed.
func (c *client) isClosing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closing != ""
}

// waitDrained waits until the close frame is written, for closeWait.
func (c *client) waitDrained() {
	c.mu.Lock()
	drained := c.drained
	c.mu.Unlock()
	if drained == nil {
		return
	}
	select {
	case <-drained:
	case <-time.After(closeWait):
	}
}

// serve reads frames until the connection ends. The empty ping that a desktop client sends each
// second is answered here, once it is trusted. All else is done in a goroutine of its own, which
// ends when nothing more has come, so that the stack of this one stays small: 2 KiB instead of 8,
// which saves a quarter of the memory of an idle client.
func (c *client) serve() {
	defer recoverPanic(c.hub.log, c.name)
	defer c.inTurn(c.end)
	defer c.endOnPanic()
	done := make(chan error)
	for {
		head, err := c.reader.Peek(2)
		if err != nil {
			if c.closeSlowMessage(err) {
				continue
			}
			return
		}
		if head[0] == 0x80|opPing && head[1] == 0x80 && !c.isStranger() {
			c.reader.Discard(6) // with the mask; an error shows in the next Peek
			c.heard.Store(int64(c.hub.clock.uptime()))
			c.send(pongFrame)
			continue
		}
		go func() {
			err := errEnd
			defer func() { done <- err }()
			defer c.endOnPanic()
			err = c.readFrames()
		}()
		if err := <-done; err != nil {
			c.waitDrained()
			return
		}
	}
}

// readFrames reads a frame, and those that have come with it.
func (c *client) readFrames() error {
	for {
		if err := c.readFrame(); err != nil || c.reader.Buffered() == 0 {
			return err
		}
	}
}

// end forgets the client.
func (c *client) end() {
	defer c.handler.clients.Add(-1)
	reason := c.abort("gone")
	c.releaseSlot()
	c.hub.remove(c)
	c.hub.metrics.closed.add(reason)
	lg := c.hub.log
	switch reason {
	case outboxFull:
		lg.warnOnce(reason, "%s: closed, since its outbox is full: "+
			"the client, or the network to it, is too slow", c.name)
	case "stalled":
		lg.warnOnce(reason, "%s: closed, since nothing could be written for %v: "+
			"the client, or the network to it, is too slow", c.name, stalledAfter)
	}
	lg.debugf("%s: disconnected: %s", c.name, reason)
}

// endOnPanic, deferred, ends this connection alone when there is a bug.
func (c *client) endOnPanic() {
	if p := recover(); p != nil {
		logPanic(c.hub.log, c.name, p)
		c.abort("panic")
	}
}

// errEnd ends the reading: the client is gone, or both close frames were sent.
var errEnd = errors.New("the connection ends")

// readFrame reads a frame and does what it says. After a close frame of ours it reads on
// until the client's close frame: proxies and browsers take an earlier end for a failure.
// An error ends the connection.
func (c *client) readFrame() (err error) {
	defer func() {
		if p := recover(); p != nil {
			logPanic(c.hub.log, c.name, p)
			c.send(closeFrame(statusInternal, "panic", "internal error"))
			err = errEnd
		}
	}()
	h, payload, err := c.readHeader()
	if err != nil {
		if c.closeSlowMessage(err) {
			return nil
		}
		return errEnd
	}
	if !c.isClosing() {
		err = c.handleFrame(h, payload)
		var r *refusal
		if !errors.As(err, &r) {
			return err
		}
		c.hub.log.debugf("%s: closed with %d: %s", c.name, r.status, r.text)
		c.releaseSlot()
		c.inTurn(func() { c.send(closeFrame(r.status, r.reason, r.text)) })
	}
	if h.endless {
		payload = c.conn // nobody knows where the next frame begins
	}
	if _, err := io.Copy(io.Discard, payload); err != nil || h.endless || h.opcode == opClose {
		return errEnd
	}
	return nil
}

// closeSlowMessage sends a close frame if err is the deadline of a message whose fragments do
// not come soon enough, and reports whether it did.
func (c *client) closeSlowMessage(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) || c.opcode == 0 || c.isClosing() {
		return false
	}
	c.releaseSlot()
	c.inTurn(func() { c.send(closeFrame(statusPolicy, "slow-message", slowMessage)) })
	return true
}

const slowMessage = "a message did not come soon enough"

// A frameHeader is what stands before a payload (RFC 6455, section 5.2).
type frameHeader struct {
	opcode   byte
	final    bool
	reserved bool // a reserved bit is set
	masked   bool
	shortest bool  // the length is in its shortest form
	endless  bool  // the top bit of a 64-bit length is set, which RFC 6455 forbids
	size     int64 // of the payload, in bytes
}

func (h *frameHeader) control() bool { return h.opcode >= opClose }

// readHeader reads the header of a frame, and returns it with the reader of the payload.
// x/net/websocket reads and unmasks, but checks nothing, and drops the first bit of a
// length of 64 bits.
func (c *client) readHeader() (frameHeader, io.Reader, error) {
	endless := false
	if head, err := c.reader.Peek(2); err == nil && head[1]&0x7f == 127 {
		head, err = c.reader.Peek(3)
		endless = err == nil && head[2]&0x80 != 0
	}
	frame, err := c.nextFrame()
	if err != nil {
		return frameHeader{}, nil, err
	}
	var raw [14]byte
	if _, err := frame.HeaderReader().Read(raw[:]); err != nil {
		return frameHeader{}, nil, err
	}
	h := frameHeader{
		opcode:   raw[0] & 0x0f,
		final:    raw[0]&0x80 != 0,
		reserved: raw[0]&0x70 != 0,
		masked:   raw[1]&0x80 != 0,
		endless:  endless,
		shortest: true,
		size:     int64(raw[1] & 0x7f),
	}
	switch h.size {
	case 126:
		h.size = int64(binary.BigEndian.Uint16(raw[2:]))
		h.shortest = h.size > 125
	case 127:
		h.size = int64(binary.BigEndian.Uint64(raw[2:]))
		h.shortest = h.size > 1<<16-1
	}
	return h, frame, nil
}

// fault returns what RFC 6455, section 5, forbids about a frame, or "". begun is the opcode of a
// message of which fragments came, or 0.
func (h *frameHeader) fault(begun byte) string {
	switch {
	case h.reserved:
		return "reserved bits are set, but no extension was agreed on"
	case h.opcode > opBinary && !h.control() || h.opcode > opPong:
		return "unknown opcode"
	case !h.masked:
		return "a client must mask its frames"
	case h.endless:
		return "a length with its first bit set"
	case !h.shortest:
		return "a length that is not in its shortest form"
	case h.control() && (!h.final || h.size > 125):
		return "a control frame is fragmented or longer than 125 bytes"
	case !h.control() && (h.opcode == opContinuation) != (begun != 0):
		return "a fragment is out of place"
	}
	return ""
}

// handleFrame does what a frame says. An error is a *refusal with a close status, or
// errEnd.
func (c *client) handleFrame(h frameHeader, payload io.Reader) error {
	if fault := h.fault(c.opcode); fault != "" {
		return refuse(statusProtocol, "protocol", "%s", fault)
	}
	if h.control() {
		text, err := io.ReadAll(payload)
		if err != nil || int64(len(text)) < h.size {
			return errEnd
		}
		c.heard.Store(int64(c.hub.clock.uptime()))
		c.inTurn(func() { err = c.handleControl(h.opcode, text) })
		return err
	}
	if err := c.readPayload(h, payload); err != nil {
		return err
	}
	c.heard.Store(int64(c.hub.clock.uptime()))
	if h.opcode != opContinuation {
		c.opcode = h.opcode
	}
	switch {
	case !h.final && h.opcode != opContinuation && !c.hasSlot:
		c.setReadDeadline(time.Now().Add(messageTime)) // or fragments could be held for ever
	case h.final && h.opcode == opContinuation:
		c.setReadDeadline(time.Time{})
	}
	if !h.final {
		c.inTurn(func() {}) // else strangers could send fragments without turns
		return nil
	}
	return c.endMessage()
}

// endMessage does what the message says that has come whole.
func (c *client) endMessage() error {
	text := c.fragments.Bytes()
	opcode := c.opcode
	c.fragments = bytes.Buffer{}
	c.opcode = 0
	defer c.releaseSlot()
	if opcode == opText && !utf8.Valid(text) {
		return refuse(statusInvalid, "protocol", "a text message is not UTF-8")
	}
	return c.handleMessage(text)
}

// handleControl answers a ping, and a close frame with the client's own status.
func (c *client) handleControl(opcode byte, payload []byte) error {
	switch opcode {
	case opPing:
		c.send(newMessage(opPong, payload))
		return nil
	case opPong:
		return nil
	}
	status := statusNone
	if len(payload) > 0 {
		if len(payload) > 1 {
			status = int(binary.BigEndian.Uint16(payload))
		}
		if !mayBeSent(status) {
			return refuse(statusProtocol, "protocol", "a close status that must not be sent")
		}
		if !utf8.Valid(payload[2:]) {
			return refuse(statusInvalid, "protocol", "the reason of a close frame is not UTF-8")
		}
	}
	c.send(closeFrame(status, "client", ""))
	return errEnd
}

// mayBeSent reports whether a close status may stand in a close frame (RFC 6455, section
// 7.4, and the IANA registry).
func mayBeSent(status int) bool {
	return status >= 1000 && status <= 1003 || status >= 1007 && status <= 1014 ||
		status >= 3000 && status <= 4999
}

// readPayload adds a frame's payload to the message. Memory is taken as the bytes come,
// not as the header promises. A stranger's message is limited to 64 KiB, and one longer than
// 2 KiB needs a slot.
func (c *client) readPayload(h frameHeader, payload io.Reader) error {
	limit := int64(maxMessage)
	stranger := c.isStranger()
	if stranger {
		limit = maxStranger
	}
	before := int64(c.fragments.Len())
	if h.size > limit-before {
		return refuse(statusTooBig, "too-big", "a message is longer than %d KiB", limit>>10)
	}
	if stranger && before+h.size > longStranger {
		if err := c.takeSlot(); err != nil {
			return err
		}
	}
	c.fragments.Grow(int(min(h.size, longStranger)) + bytes.MinRead)
	n, err := io.Copy(&c.fragments, payload)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return refuse(statusPolicy, "slow-message", slowMessage)
	case err != nil || n < h.size:
		return errEnd
	}
	return nil
}

// isStranger reports whether c has never shown a good token, or one that was good.
func (c *client) isStranger() bool { return !c.trusted.Load() }

// inTurn calls f, which must not wait. A stranger waits for a turn first: its frames, its refusal
// and its end are handled in turns. So strangers take at most half of the processors, and an
// event does not wait behind thousands of them.
func (c *client) inTurn(f func()) {
	if c.isStranger() {
		c.handler.turns <- struct{}{}
		defer func() { <-c.handler.turns }()
	}
	f()
}

// takeSlot waits for one of the slots for long messages of strangers: without them, many
// strangers together could fill the memory. Then the message has to come soon.
func (c *client) takeSlot() error {
	if c.hasSlot {
		return nil
	}
	tooMany := refuse(statusTryLater, "no-slot", "too many long messages at once")
	select {
	case c.handler.slotQueue <- struct{}{}:
		defer func() { <-c.handler.slotQueue }()
	default:
		return tooMany
	}
	select {
	case c.handler.slots <- struct{}{}:
	case <-time.After(slotWait):
		return tooMany
	}
	c.hasSlot = true
	c.setReadDeadline(time.Now().Add(slotTime))
	return nil
}

// setReadDeadline sets the deadline for reading: 20 s from the first fragment to the last, 3 s for a
// stranger's long message, else none. For a client that is being closed enqueue has set 1 s, and it
// stays so.
func (c *client) setReadDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing == "" {
		c.conn.SetReadDeadline(t)
	}
}

func (c *client) releaseSlot() {
	if !c.hasSlot {
		return
	}
	<-c.handler.slots
	c.hasSlot = false
	c.setReadDeadline(time.Time{})
}

// handleMessage does what a client's message says. Of a stranger's, each library takes a turn of
// its own, so that others need not wait for a long list.
func (c *client) handleMessage(data []byte) (err error) {
	var kind string
	var repos []repoToken
	c.inTurn(func() { kind, repos, err = parseClientMessage(data) })
	if err != nil {
		return refuse(statusPolicy, "bad-message", "%v", err)
	}
	for _, repo := range repos {
		c.inTurn(func() { err = c.handleRepo(kind, repo) })
		if err != nil || c.isClosing() {
			return err
		}
	}
	return nil
}

// handleRepo subscribes or unsubscribes one library of a message of that type.
func (c *client) handleRepo(kind string, repo repoToken) error {
	if kind == "subscribe" {
		return c.handleSubscription(repo)
	}
	c.hub.unsubscribe(c, repo.id)
	c.hub.log.debugf("%s: unsubscribed from %q", c.name, repo.id)
	return nil
}

// A repoToken is a library in a client's message, with the token for it if it subscribes.
type repoToken struct {
	id    string
	token string
}

// parseClientMessage returns the type of a message, subscribe or unsubscribe, and what is
// in its repos.
func parseClientMessage(data []byte) (kind string, repos []repoToken, err error) {
	kind, content, err := parseEnvelope(data)
	if err != nil {
		return "", nil, fmt.Errorf("not a message: %w", err)
	}
	if kind != "subscribe" && kind != "unsubscribe" {
		return "", nil, fmt.Errorf("unknown type %s: subscribe or unsubscribe", quoted(kind))
	}
	found := false
	err = eachMember(content, func(name, value []byte) error {
		if string(name) != "repos" {
			return nil
		}
		found = true
		return eachElement(value, func(element []byte) error {
			repo, err := parseRepo(element)
			repos = append(repos, repo)
			return err
		})
	})
	if err == nil && !found {
		err = errors.New("there are no repos")
	}
	if err != nil {
		return "", nil, fmt.Errorf(`"content" must be {"repos":[{"id":...}]}: %w`, err)
	}
	return kind, repos, nil
}

// parseRepo returns what an element of repos says.
func parseRepo(element []byte) (repo repoToken, err error) {
	err = eachMember(element, func(name, value []byte) error {
		ok := true
		switch string(name) {
		case "id":
			repo.id, ok = jsonString(value)
		case "jwt_token":
			repo.token, ok = jsonString(value)
		}
		if !ok {
			return fmt.Errorf("%s is not a string", name)
		}
		return nil
	})
	if err == nil && (repo.id == "" || len(repo.id) > maxRepoID) {
		err = errors.New("a repo without an id, or with one that is too long")
	}
	return repo, err
}

// handleSubscription subscribes, or answers jwt-expired to a token that does not hold. An error
// ends the connection.
func (c *client) handleSubscription(repo repoToken) error {
	lg := c.hub.log
	cl, err := c.handler.verifier.verifySubscription(repo.token, repo.id)
	if err != nil {
		return c.refuseSubscription(repo.id, err)
	}
	c.trusted.Store(true)
	c.refusedInRow = 0
	if !c.hub.subscribe(c, cl) {
		lg.debugf("%s: the token for %q ends no later than the one that ran out", c.name, repo.id)
		c.send(expiredFrame(repo.id))
		return nil
	}
	lg.debugf("%s: subscribed to %q, user %q", c.name, repo.id, cl.username)
	return nil
}

// refuseSubscription answers a token that does not hold. It returns an error when that was the
// last of too many in a row. Tokens that ran out do not count: a client that slept has one for
// each library.
func (c *client) refuseSubscription(repoID string, err error) error {
	lg := c.hub.log
	r := c.handler.logRefusal("a subscription", c.name, c.isCheck, err)
	wasGood := r.reason == "expired" || r.reason == "long-expired"
	if wasGood {
		c.trusted.Store(true)
	}
	c.hub.expire(c, repoID)
	m := expiredFrame(repoID)
	lg.debugf("to %s: %s", c.name, m.payload())
	c.send(m)
	if wasGood {
		return nil
	}
	if c.refusedInRow++; c.refusedInRow < maxRefused {
		return nil
	}
	lg.warnOnce("too many refused", "%s: closed after %d refused subscriptions in a row; "+
		"the last one: %v", c.name, c.refusedInRow, err)
	return refuse(statusPolicy, "refused", "too many refused subscriptions")
}

// ---- HTTP handlers ----
//
// Requests: their paths, methods and limits, and the answers to them. An error of a handler
// becomes an answer in handler.writeRefusal, and nowhere else. A handler waits for its peer only
// to read the body and to write the answer, 20 s at most; never for another client or for
// seaf-server. handler.findMembers runs in a goroutine for each event that waits for group
// members, and ends with the lookup. The lock of plainLimit guards the list of connections that
// are not upgraded.

const (
	reservedFiles   = 64                     // descriptors kept from clients: senders, /ping, log
	usualPlain      = reservedFiles / 2      // connections that do not upgrade, see plainLimit
	crowdedPlain    = reservedFiles * 3 / 4  // of them, beyond which none is accepted or kept idle
	extraPlain      = 4096                   // more of both, while clients leave descriptors free
	plainWait       = time.Second            // without a change, for one beyond usualPlain
	plainWaitShort  = 10 * time.Millisecond  // for an idle one beyond crowdedPlain
	refusedBodyWait = 20 * time.Millisecond  // for a body that nobody reads
	bodyStart       = 16 << 10               // bytes of memory that an event's body begins with
	maxHead         = 64 << 10               // bytes of a request's head; nginx passes 32 KiB
	upgradeWait     = 20 * time.Second       // for the answer to an upgrade to be written
	lookupSlack     = 500 * time.Millisecond // by which a lookup ends late on a busy machine
	lookupWait      = 5 * time.Second        // for seaf-server to tell who is in a group
)

// maxClients is how many clients the limit of open files allows. Go has raised the soft
// limit to the hard one before main.
func maxClients() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 1
	}
	return max(int(min(limit.Cur, 1<<22))-reservedFiles, 1)
}

// A handler answers requests.
type handler struct {
	hub        *hub
	verifier   *verifier
	groups     *groups
	log        *logger
	metrics    *metrics
	clock      clock
	routes     map[string]route // by path
	maxClients int64
	clients    atomic.Int64 // WebSocket connections, and those about to be
	plain      plainLimit
	slots      chan struct{} // holds a value for each client that has one, see client.takeSlot
	slotQueue  chan struct{} // likewise for each that waits for a slot
	turns      chan struct{} // likewise for each that has a turn, see client.inTurn
}

// newHandler returns a handler with the log, the metrics and the clock of the hub.
func newHandler(h *hub, v *verifier, g *groups) *handler {
	handler := &handler{
		hub:        h,
		verifier:   v,
		groups:     g,
		log:        h.log,
		metrics:    h.metrics,
		clock:      h.clock,
		maxClients: int64(h.places),
		slots:      make(chan struct{}, maxSlots),
		slotQueue:  make(chan struct{}, maxSlotWait),
		turns:      make(chan struct{}, max(runtime.GOMAXPROCS(0)/2, 1)),
	}
	handler.plain = plainLimit{handler: handler, conns: list.New()}
	handler.routes = map[string]route{
		"":       {[]string{"GET", "HEAD"}, handler.serveClient},
		"ping":   {[]string{"GET", "HEAD"}, handler.servePing},
		"events": {[]string{"POST"}, handler.serveEvent},
	}
	return handler
}

// newHTTPServer returns a server with timeouts for slow peers. Idle connections stay longer
// than in the pools of the senders: 90 s (Go), 118 s (libcurl).
func newHTTPServer(h http.Handler, lg *logger) *http.Server {
	return &http.Server{
		Handler:                      h,
		MaxHeaderBytes:               maxHead - 4<<10, // net/http adds 4 KiB
		ReadHeaderTimeout:            10 * time.Second,
		ReadTimeout:                  20 * time.Second,
		WriteTimeout:                 20 * time.Second,
		IdleTimeout:                  3 * time.Minute,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     log.New(lg, "", 0),
		ConnState:                    trackPlain,
	}
}

// ServeHTTP ignores repeated and trailing slashes and a leading /notification, since each
// proxy rule in use leaves others.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer h.abortOnPanic(r)
	fields := strings.FieldsFunc(r.URL.Path, func(c rune) bool { return c == '/' })
	if len(fields) > 0 && fields[0] == "notification" {
		fields = fields[1:]
	}
	path := strings.Join(fields, "/")
	if path != "events" && r.ContentLength != 0 {
		dropBody(w)
	}
	if err := h.serve(path, w, r); err != nil {
		h.writeRefusal(w, r, path, err)
	}
}

// A route says which methods a path takes, and who serves it.
type route struct {
	methods []string
	serve   func(http.ResponseWriter, *http.Request) error
}

// serve answers a request for path, or returns an error.
func (h *handler) serve(path string, w http.ResponseWriter, r *http.Request) error {
	to, found := h.routes[path]
	if !found {
		return refuse(http.StatusNotFound, "not-found",
			"not found: the notification server answers /, /ping and /events")
	}
	if slices.Contains(to.methods, r.Method) {
		return to.serve(w, r)
	}
	allowed := strings.Join(to.methods, ", ")
	w.Header().Set("Allow", allowed)
	if r.Method == "OPTIONS" { // so HAProxy checks health
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	return refuse(http.StatusMethodNotAllowed, "bad-method", "the method must be %s", allowed)
}

// abortOnPanic, deferred, ends the connection of a request alone when there is a bug.
func (h *handler) abortOnPanic(r *http.Request) {
	if p := recover(); p != nil {
		logPanic(h.log, "a request from "+peer(r), p)
		panic(http.ErrAbortHandler) // net/http closes the connection, and logs nothing
	}
}

func (h *handler) servePing(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "application/json")
	io.WriteString(w, `{"ret": "pong"}`+"\n")
	return nil
}

// writeRefusal answers a request for path with an error, and logs it.
func (h *handler) writeRefusal(w http.ResponseWriter, r *http.Request, path string, err error) {
	what := "a request"
	if path == "events" {
		what = "an event"
	}
	refused := h.logRefusal(what, peer(r), r.UserAgent() == checkAgent, err)
	header := w.Header()
	switch refused.status {
	case http.StatusUnauthorized:
		header.Set("WWW-Authenticate", "Token")
	case http.StatusUpgradeRequired:
		header.Set("Upgrade", "websocket")
		header.Set("Connection", "Upgrade")
		header.Set("Sec-WebSocket-Version", "13")
	case http.StatusServiceUnavailable:
		header.Set("Retry-After", "60")
		header.Set("Connection", "close") // it must not keep a reserved descriptor
	}
	if path == "events" && r.ContentLength != 0 { // else ServeHTTP has done so
		dropBody(w)
	}
	http.Error(w, refused.text, refused.status)
}

// dropBody has net/http not wait for a body that nobody reads before it ends the answer.
func dropBody(w http.ResponseWriter) {
	http.NewResponseController(w).SetReadDeadline(time.Now().Add(refusedBodyWait))
	w.Header().Set("Connection", "close")
}

// logRefusal counts a refusal and logs it, once a minute for each reason and kind of
// sender: what is "a request", "an event" or "a subscription". What a self-check is refused
// on purpose is no cause for a warning.
func (h *handler) logRefusal(what, from string, isCheck bool, err error) *refusal {
	var r *refusal
	if !errors.As(err, &r) {
		r = refuse(http.StatusInternalServerError, "internal", "internal error: %v", err)
	}
	key := what + " " + r.reason
	if isCheck && checkProvokes(r.reason) {
		h.metrics.refused.add("self-check")
		if h.log.takeMinute("self-check " + key) {
			h.log.infof("self-check: %s from %s refused: %s", what, from, r.text)
		}
		return r
	}
	h.metrics.refused.add(r.reason)
	h.log.warnOnce(key, "%s from %s refused: %s", what, from, r.text)
	return r
}

// checkProvokes reports whether a self-check is refused for a reason on purpose. Anybody can call
// himself a self-check: what he is refused is logged, but as information.
func checkProvokes(reason string) bool {
	return reason == "client-token" || reason == "claims" || reason == "malformed"
}

// peer names the sender of a request, for the log: its address, X-Forwarded-For and
// User-Agent.
func peer(r *http.Request) string {
	name := r.RemoteAddr
	// HAProxy adds a line of its own to those that came.
	if forwarded := r.Header.Values("X-Forwarded-For"); len(forwarded) > 0 {
		name += " for " + quoted(strings.Join(forwarded, ", "))
	}
	if agent := r.UserAgent(); agent != "" {
		name += " (" + quoted(agent) + ")"
	}
	return name
}

// serveEvent answers as soon as the event is queued, since the Go file server makes the
// user's upload wait for the answer.
func (h *handler) serveEvent(w http.ResponseWriter, r *http.Request) error {
	token, err := tokenOfEvent(r)
	if err != nil {
		return err
	}
	cl, err := h.verifier.verifyEvent(token)
	if err != nil {
		return err
	}
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	ev, err := parseEvent(body)
	if err != nil {
		return refuse(http.StatusBadRequest, "bad-event", "%v", err)
	}
	if cl.repoID != "" && cl.repoID != ev.repoID {
		return refuse(http.StatusForbidden, "other-library", "the token is for another library")
	}
	counted := ev.kind
	if r.UserAgent() == checkAgent {
		counted = "self-check" // a health check each 30 s must not look like seaf-server's events
	}
	h.metrics.events.add(counted)
	subscribers, waits := h.hub.publish(ev)
	if waits {
		go h.findMembers(ev)
	}
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"subscribers":%d}`+"\n", subscribers)
	return nil
}

// tokenOfEvent returns the token of an event: Seafile 12 and later send it in Authorization,
// 10 and 11 in a header of their own. The scheme's case does not matter (RFC 9110,
// section 11.1).
func tokenOfEvent(r *http.Request) (string, error) {
	scheme, token, found := strings.Cut(r.Header.Get("Authorization"), " ")
	if !found || !strings.EqualFold(scheme, "Token") {
		token = r.Header.Get("Seafile-Repo-Token")
	}
	token = strings.TrimSpace(token)
	if token == "" {
		return "", refuse(http.StatusUnauthorized, "no-token",
			"there is no token in Authorization: Token or in Seafile-Repo-Token")
	}
	return token, nil
}

// readBody returns the body of an event, of at most 1 MiB. It allocates at most 16 KiB by
// Content-Length, and more only as bytes arrive.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	var body bytes.Buffer
	body.Grow(int(max(min(r.ContentLength, bodyStart), 0)) + bytes.MinRead)
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, maxMessage))
	var tooBig *http.MaxBytesError
	switch {
	case errors.As(err, &tooBig):
		return nil, refuse(http.StatusRequestEntityTooLarge, "too-big",
			"the event is longer than 1 MiB")
	case err != nil:
		return nil, refuse(http.StatusBadRequest, "bad-event",
			"the event did not come in whole: %v", err)
	}
	return body.Bytes(), nil
}

// findMembers asks seaf-server who is in the group of a waiting event, and has it delivered.
func (h *handler) findMembers(ev *event) {
	defer recoverPanic(h.log, "delivering to a group")
	members, err := h.askMembers(ev.group)
	result := "ok"
	if err != nil {
		result = "failed"
		h.metrics.refused.add("group-members")
	}
	h.metrics.lookups.add(result)
	h.hub.resolve(ev, members, err)
}

// askMembers asks seaf-server who is in a group. If the process was stopped meanwhile, it asks
// once more: it was not seaf-server that took the time.
func (h *handler) askMembers(group int64) (members map[string]bool, err error) {
	for range 2 {
		start := h.clock.uptime()
		ctx, cancel := context.WithTimeout(context.Background(), lookupWait)
		members, err = h.groups.members(ctx, group)
		cancel()
		wasAway := h.clock.uptime()-start > lookupWait+lookupSlack
		if !timedOut(err) || !wasAway {
			break
		}
	}
	return members, err
}

// An event is what changed in a library, as it was posted.
type event struct {
	message  *message // {"type","content"} in compact JSON
	kind     string   // its type
	repoID   string
	user     string          // the only one it is for, "" for all
	forGroup bool            // it is for the members of group alone
	group    int64           // group ID
	resolved bool            // guarded by hub.mu, like the fields below
	members  map[string]bool // nil: not known
	failure  error           // why they are not known
}

// isFor reports whether a subscription of user gets the event.
func (ev *event) isFor(user string) bool {
	if ev.forGroup {
		return ev.members[user]
	}
	return ev.user == "" || ev.user == user
}

// The types of events. A new one is a constant here and in the case of parseEvent; setAudience
// has to know it if it is not for all.
const (
	repoUpdate        = "repo-update"
	fileLockChanged   = "file-lock-changed"
	folderPermChanged = "folder-perm-changed"
	commentUpdate     = "comment-update"
)

// parseEvent reads the body of a posted event. Of the names in it only those count that a
// client reads: their case is exact, and the repo ID is given once.
func parseEvent(body []byte) (*event, error) {
	kind, content, err := parseEnvelope(body)
	if err != nil {
		return nil, fmt.Errorf("the event is not one JSON object: %w", err)
	}
	switch kind {
	case repoUpdate, fileLockChanged, folderPermChanged, commentUpdate:
	default:
		return nil, fmt.Errorf("unknown type %s", quoted(kind))
	}
	fields, err := parseContent(content)
	if err != nil {
		return nil, err
	}
	text := slices.Concat([]byte(`{"type":"`+kind+`","content":`), content, []byte("}"))
	ev := &event{message: newMessage(opText, text), kind: kind, repoID: fields.repoID}
	switch kind {
	case repoUpdate:
		ev.message.updateOf = fields.repoID
	case folderPermChanged:
		err = ev.setAudience(fields)
	}
	return ev, err
}

// An eventContent is what this server reads of an event's content.
type eventContent struct {
	repoIDs  int // how often repo_id is given
	repoID   string
	kind     string // "type"; user or group in a folder-perm-changed
	user     string
	group    int64
	hasGroup bool
}

// parseContent reads the content of an event, which is compact JSON.
func parseContent(content []byte) (fields eventContent, err error) {
	err = eachMember(content, func(name, value []byte) error {
		switch string(name) {
		case "repo_id":
			fields.repoIDs++
			fields.repoID, _ = jsonString(value)
		case "type":
			fields.kind, _ = jsonString(value)
		case "user":
			fields.user, _ = jsonString(value)
		case "group":
			if string(value) == "null" {
				return nil
			}
			// -1 is seaf-server's way of saying none.
			fields.hasGroup = string(value) != "-1"
			if err := json.Unmarshal(value, &fields.group); err != nil {
				return errors.New("the group is not a number")
			}
		}
		return nil
	})
	if err == nil && (fields.repoIDs != 1 || fields.repoID == "") {
		err = errors.New("repo_id must be given once, as a string that is not empty")
	}
	if err != nil {
		return fields, fmt.Errorf("the content of the event is wrong: %w", err)
	}
	return fields, nil
}

// setAudience notes whom a folder-perm-changed is for: one user, or the members of a group.
func (ev *event) setAudience(fields eventContent) error {
	forUser := fields.user != "" && fields.kind != "group"
	forGroup := fields.hasGroup && fields.kind != "user"
	known := fields.kind == "user" || fields.kind == "group" || fields.kind == ""
	if forUser == forGroup || !known {
		return errors.New("a folder-perm-changed needs the type user and a user, " +
			"or the type group and the number of a group")
	}
	if forUser {
		ev.user = fields.user
		return nil
	}
	ev.forGroup = true
	ev.group = fields.group
	return nil
}

// serveClient upgrades a request to a WebSocket (RFC 6455, section 4.2). It checks no
// Origin: behind a proxy each real client's differs from the Host, and the token protects.
func (h *handler) serveClient(w http.ResponseWriter, r *http.Request) error {
	if err := checkUpgrade(r); err != nil {
		return err
	}
	if h.clients.Add(1) > h.maxClients {
		h.clients.Add(-1)
		return refuse(http.StatusServiceUnavailable, "full",
			"%d clients are connected; the limit of open files allows no more: raise it (ulimit "+
				"-n, LimitNOFILE=)", h.maxClients)
	}
	c := &client{
		hub:     h.hub,
		handler: h,
		name:    peer(r),
		desktop: hasWord(r.Header, "Sec-WebSocket-Protocol", subprotocol),
		isCheck: r.UserAgent() == checkAgent,
	}
	c.heard.Store(int64(h.clock.uptime()))
	defer func() {
		if c.nextFrame != nil {
			return
		}
		if c.conn != nil { // the answer could not be written
			c.conn.Close()
		}
		h.clients.Add(-1)
	}()
	answerUpgrade(w, r, c)
	if c.nextFrame == nil {
		return nil
	}
	c.conn.SetWriteDeadline(time.Time{})
	h.log.debugf("%s: connected", c.name)
	h.hub.add(c)
	go c.serve()
	return nil
}

// answerUpgrade answers the upgrade, which was checked. If that works, c has its nextFrame.
func answerUpgrade(w http.ResponseWriter, r *http.Request, c *client) {
	// x/net/websocket looks at one line of each of these, and would answer a bad Host by itself.
	r.Host = "localhost"
	r.Header["Connection"] = []string{"upgrade"}
	r.Header["Upgrade"] = []string{"websocket"}
	r.Header["Sec-Websocket-Version"] = []string{"13"}
	delete(r.Header, "Sec-Websocket-Protocol")
	if c.desktop {
		r.Header["Sec-Websocket-Protocol"] = []string{subprotocol} // the answer repeats it
	}
	websocket.Server{
		// Without a function of ours it would refuse a handshake without Origin.
		Handshake: func(*websocket.Config, *http.Request) error { return nil },
		Handler: func(ws *websocket.Conn) {
			// This function is all that is kept of ws.
			next := ws.NewFrameReader
			c.nextFrame = func() (frameReader, error) { return next() }
		},
	}.ServeHTTP(&hijacker{w, c}, r)
}

// checkUpgrade returns what is missing for an upgrade. HTTP/1.0 is good: nginx sends it
// without proxy_http_version.
func checkUpgrade(r *http.Request) error {
	if !hasWord(r.Header, "Connection", "upgrade") || !hasWord(r.Header, "Upgrade", "websocket") {
		return refuse(http.StatusUpgradeRequired, "no-websocket",
			"This is Seafile's notification server. Its clients connect here by WebSocket; this "+
				"request does not. To check that it works, ask for /ping, or run "+
				"notification-server -c DIR -check URL. If a client got this, its proxy does not "+
				"pass on the headers Upgrade and Connection.")
	}
	if r.Method != "GET" {
		return refuse(http.StatusUpgradeRequired, "no-websocket",
			"A WebSocket needs GET, but this request came by %s.", r.Method)
	}
	if r.ContentLength != 0 {
		return refuse(http.StatusBadRequest, "no-websocket",
			"An upgrade to WebSocket must not have a body.")
	}
	if !hasWord(r.Header, "Sec-WebSocket-Version", "13") {
		return refuse(http.StatusUpgradeRequired, "no-websocket",
			"Sec-WebSocket-Version must be 13")
	}
	key, err := base64.StdEncoding.DecodeString(r.Header.Get("Sec-WebSocket-Key"))
	if err != nil || len(key) != 16 {
		return refuse(http.StatusBadRequest, "no-websocket",
			"Sec-WebSocket-Key must be 16 bytes in base64")
	}
	return nil
}

// hasWord reports whether a header, which may have several lines, lists a word in any case
// of letters.
func hasWord(header http.Header, name, word string) bool {
	for _, line := range header.Values(name) {
		for item := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(item), word) {
				return true
			}
		}
	}
	return false
}

// A hijacker gives x/net/websocket the connection of a client with a small buffer in place
// of net/http's of 4 KiB, and keeps it open.
type hijacker struct {
	http.ResponseWriter
	client *client
}

// An unclosed is a connection that x/net/websocket does not close when its handler returns.
type unclosed struct{ net.Conn }

func (unclosed) Close() error { return nil }

func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := h.ResponseWriter.(http.Hijacker).Hijack()
	if err != nil {
		return nil, nil, err
	}
	c := h.client
	if plain, ok := conn.(*plainConn); ok {
		conn = plain.Conn
	}
	c.conn = conn
	var input io.Reader = conn
	if n := rw.Reader.Buffered(); n > 0 { // a frame came right behind the request
		early, _ := rw.Reader.Peek(n)
		input = io.MultiReader(bytes.NewReader(slices.Clone(early)), conn)
	}
	c.reader = bufio.NewReaderSize(input, readBuffer)
	conn.SetWriteDeadline(time.Now().Add(upgradeWait)) // net/http has removed its deadlines
	if tcp, ok := conn.(*net.TCPConn); ok {
		// With Linux's 4 MiB a slow reader looks like a stuck one: the kernel reports room
		// in its buffer only after a third of it was read.
		tcp.SetWriteBuffer(sendBuffer)
	}
	if c.raw, err = conn.(syscall.Conn).SyscallConn(); err != nil {
		return nil, nil, err
	}
	return unclosed{conn}, bufio.NewReadWriter(c.reader, rw.Writer), nil
}

// A plainLimit limits the connections that do not upgrade, so that strangers cannot take the
// descriptors that are kept for senders, /ping, the log and seaf-server. Beyond the limit it
// closes those on which nothing happened for the longest time.
type plainLimit struct {
	handler *handler

	mu    sync.Mutex // guards the field below, and those of plainConn
	conns *list.List // of *plainConn, in the order of their last change
}

// A plainListener accepts connections under the limit, which other listeners share.
type plainListener struct {
	net.Listener
	limit *plainLimit
}

// A plainConn is a connection that speaks HTTP.
type plainConn struct {
	net.Conn
	limit   *plainLimit
	element *list.Element // of limit.conns
	changed time.Time     // when it came, or a request on it began or ended
	active  bool          // the head of a request has come, and it is not answered yet
}

// Accept waits for the next connection, and for room for it: some milliseconds, or up to a
// second while nearly all connections have a request. First it yields the processor to all that
// has work to do. So when thousands come at once, they queue in the kernel and not here, in front of an
// event: its sender waits a quarter of the time (BenchmarkReturn).
func (l *plainListener) Accept() (net.Conn, error) {
	for {
		runtime.Gosched()
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.limit.waitForRoom() {
			return l.limit.track(conn), nil
		}
		conn.Close()
		l.limit.handler.refuseConnection()
	}
}

// waitForRoom reports whether there was room within plainWait.
func (l *plainLimit) waitForRoom() bool {
	end := time.Now().Add(plainWait)
	for !l.makeRoom() {
		if time.Now().After(end) {
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return true
}

func (l *plainLimit) track(conn net.Conn) *plainConn {
	c := &plainConn{Conn: conn, limit: l, changed: time.Now()}
	l.mu.Lock()
	defer l.mu.Unlock()
	c.element = l.conns.PushBack(c)
	return c
}

// makeRoom closes connections beyond the limit that may be closed, the idle ones first, and
// reports whether there is room for another one.
func (l *plainLimit) makeRoom() bool {
	places := max(l.handler.maxClients-l.handler.clients.Load(), 0)
	free := int(min(places, extraPlain))
	for range l.closeSome(free, false) + l.closeSome(free, true) {
		l.handler.refuseConnection()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conns.Len() < crowdedPlain+free
}

// refuseConnection counts and logs a connection that was closed, or not accepted, to keep within
// the limit.
func (h *handler) refuseConnection() {
	h.metrics.refused.add("no-room")
	h.log.warnOnce("no-room", "connections are closed, since too many are open that are no "+
		"clients of notifications; requests on them may be lost: let only the proxy, seaf-server "+
		"and Seahub reach this port")
}

// closeSome closes connections beyond the limit: with a request or without, as active says, those
// on which nothing happened for the longest time first. It returns how many. free is by how many
// more than usual there may be.
func (l *plainLimit) closeSome(free int, active bool) (closed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	var next *list.Element
	for e := l.conns.Front(); e != nil && l.conns.Len() >= usualPlain+free; e = next {
		next = e.Next()
		c := e.Value.(*plainConn)
		wait := plainWait
		if !active && l.conns.Len() >= crowdedPlain+free {
			wait = plainWaitShort
		}
		if now.Sub(c.changed) < wait {
			break // the others changed later
		}
		if c.active == active && (active || !c.hasUnread()) {
			c.Conn.Close()
			l.conns.Remove(e)
			closed++
		}
	}
	return closed
}

// hasUnread reports whether a request has come that net/http has not begun to read: on a busy
// machine it takes some time to do so.
func (c *plainConn) hasUnread() bool {
	raw, err := c.Conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	raw.Control(func(fd uintptr) {
		n, _, _ = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	return n > 0
}

// trackPlain is called by net/http when the state of a connection changes.
func trackPlain(conn net.Conn, state http.ConnState) {
	c, ok := conn.(*plainConn)
	if !ok {
		return
	}
	l := c.limit
	l.mu.Lock()
	defer l.mu.Unlock()
	switch state {
	case http.StateHijacked, http.StateClosed:
		l.conns.Remove(c.element)
	default:
		c.active = state == http.StateActive
		c.changed = time.Now()
		l.conns.MoveToBack(c.element)
	}
}

// Write counts and logs one of the refusals that net/http makes by itself: of a head that is
// too long.
func (c *plainConn) Write(p []byte) (int, error) {
	if bytes.HasPrefix(p, []byte("HTTP/1.1 431 ")) {
		c.limit.handler.logRefusal("a request", c.RemoteAddr().String(), false,
			refuse(http.StatusRequestHeaderFieldsTooLarge, "head-too-long",
				"its head is longer than %d KiB", maxHead>>10))
	}
	return c.Conn.Write(p)
}

// CloseWrite lets net/http end an answer without losing it.
func (c *plainConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// ---- Group members ----
//
// The question to seaf-server who is in a group, over its Unix socket. This part knows
// nothing of events or clients, and keeps no answer. Its lock guards the questions that
// are being asked. groups.answer runs in a goroutine for each question, and ends with the answer
// or its deadline.

const (
	maxQuestions = 4                    // at a time: seaf-server's threads are few
	maxReplySize = 8 << 20              // bytes; some 80,000 members
	connectRetry = 5 * time.Millisecond // between two tries while seaf-server's backlog is full

	// By so much a question ends before its caller stops waiting, who then hears the reason.
	reasonWait = 50 * time.Millisecond
)

// errUnknownGroup says that seaf-server answered null. That means "not known", never
// "nobody": it answers so for a group that is gone or empty, and when its database is down.
var errUnknownGroup = errors.New("seaf-server does not know them: " +
	"the group is gone or empty, or seaf-server's database is down")

// errNoSocket says that there is no seafile.sock to connect to.
var errNoSocket = errors.New("start seaf-server, " +
	"or set SEAFILE_RPC_PIPE_PATH to the directory of its seafile.sock")

// groups asks seaf-server for the members of groups.
type groups struct {
	socket    func() string // path of seafile.sock, "" if there is none
	paths     []string      // where it may be, for an error
	questions chan struct{} // holds a value for each one that is being asked

	mu     sync.Mutex // guards asking
	asking map[int64]*question
}

// A question is one that several events can wait for.
type question struct {
	sent    bool          // guarded by groups.mu: seaf-server may have read its database
	done    chan struct{} // closed when the fields below are there
	members map[string]bool
	err     error
}

func newGroups(socket func() string, paths []string) *groups {
	return &groups{
		socket:    socket,
		paths:     paths,
		questions: make(chan struct{}, maxQuestions),
		asking:    map[int64]*question{},
	}
}

// members returns the user names of a group's members. It waits for its turn and for the
// answer until ctx is done. About one group there is one question at a time, and one that
// waits for its turn is shared: an answer that was on its way when an event came may be older
// than the event. An error means that the members are not known.
func (g *groups) members(ctx context.Context, group int64) (map[string]bool, error) {
	for {
		q, mine, fresh := g.join(group)
		if mine {
			go g.answer(ctx, group, q) // so that a hung file system does not hold up the caller
		}
		select {
		case <-q.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("seaf-server did not answer in time: %w", ctx.Err())
		}
		// A question that was asked already may have been answered before our event, and the
		// caller that asked may have had an earlier deadline: then ask anew.
		ranOut := timedOut(q.err) && ctx.Err() == nil
		if mine || fresh && !ranOut {
			return q.members, q.err
		}
	}
}

// join returns the question about a group. It is the caller's to ask if there was none, and
// fresh if seaf-server cannot have read its database for it yet.
func (g *groups) join(group int64) (q *question, mine, fresh bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if q := g.asking[group]; q != nil {
		return q, false, !q.sent
	}
	q = &question{done: make(chan struct{})}
	g.asking[group] = q
	return q, true, true
}

// answer asks q, and gives the answer to all who wait for it. A bug is an error, too.
func (g *groups) answer(ctx context.Context, group int64, q *question) {
	defer func() {
		if p := recover(); p != nil {
			q.err = fmt.Errorf("a bug in this server: %v; please report this: %s", p, debug.Stack())
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.asking, group)
		close(q.done)
	}()
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline.Add(-reasonWait))
		defer cancel()
	}
	q.members, q.err = g.askSeafServer(ctx, group, q)
}

// markSent says that seaf-server may answer q from now on.
func (g *groups) markSent(q *question) {
	g.mu.Lock()
	defer g.mu.Unlock()
	q.sent = true
}

// askSeafServer asks seaf-server, when it is its turn.
func (g *groups) askSeafServer(
	ctx context.Context, group int64, q *question,
) (map[string]bool, error) {
	select {
	case g.questions <- struct{}{}:
		defer func() { <-g.questions }()
	case <-ctx.Done():
		return nil, fmt.Errorf("too many questions wait for seaf-server: %w", ctx.Err())
	}
	socket := g.socket()
	if socket == "" {
		return nil, fmt.Errorf("there is no %s: %w", strings.Join(g.paths, ", nor "), errNoSocket)
	}
	conn, err := dialSeafServer(ctx, socket)
	if err != nil {
		return nil, fmt.Errorf("cannot ask seaf-server: %w: "+
			"is it running, and may this user open its socket?", err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	g.markSent(q)
	if err := writeQuestion(conn, group); err != nil {
		return nil, fmt.Errorf("asked on %s: %w", socket, err)
	}
	members, err := readMembers(conn)
	if err != nil && !errors.Is(err, errUnknownGroup) {
		return nil, fmt.Errorf("asked on %s: %w", socket, err)
	}
	return members, err
}

// dialSeafServer connects to seaf-server's socket. Versions 10 and 11 have a backlog of 10; when
// that is full, connect fails at once with EAGAIN although seaf-server is well.
func dialSeafServer(ctx context.Context, socket string) (net.Conn, error) {
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", socket)
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		select {
		case <-time.After(connectRetry):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", err, ctx.Err())
		}
	}
}

// timedOut reports whether err is that of a deadline: of a context or of a connection.
func timedOut(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded)
}

// failureKind names the cause of an error of members, in a bounded set of words.
func failureKind(err error) string {
	switch {
	case errors.Is(err, errUnknownGroup):
		return "unknown group"
	case errors.Is(err, errNoSocket):
		return "no socket"
	case timedOut(err):
		return "no answer in time"
	}
	return "bad answer"
}

// writeQuestion writes the request: a little-endian length of 4 bytes, then JSON, with the
// call as JSON in a string. The arguments are group ID, start and limit (-1, -1: all).
func writeQuestion(w io.Writer, group int64) error {
	request := make([]byte, 4)
	request = fmt.Appendf(request, `{"service":"seafserv-threaded-rpcserver",`+
		`"request":"[\"get_group_members\", %d, -1, -1]"}`, group)
	binary.LittleEndian.PutUint32(request, uint32(len(request)-4))
	_, err := w.Write(request)
	return err
}

// readMembers reads the reply to writeQuestion's request, in the same form.
func readMembers(r io.Reader) (map[string]bool, error) {
	data, err := readReply(r)
	if err != nil {
		return nil, err
	}
	var reply struct {
		Ret []struct {
			Name string `json:"user-name"`
		}
		Code int    `json:"err_code"`
		Text string `json:"err_msg"`
	}
	if err := json.Unmarshal(data, &reply); err != nil {
		return nil, fmt.Errorf("seaf-server does not answer as it should: %w", err)
	}
	if reply.Code != 0 || reply.Text != "" {
		return nil, fmt.Errorf("seaf-server answers with error %d, %q", reply.Code, reply.Text)
	}
	if reply.Ret == nil {
		return nil, errUnknownGroup
	}
	members := make(map[string]bool, len(reply.Ret))
	for _, user := range reply.Ret {
		if user.Name == "" {
			return nil, errors.New("seaf-server names a member without a user-name")
		}
		members[user.Name] = true
	}
	return members, nil
}

// readReply reads the length and the JSON of a reply. Memory is taken as the bytes come.
func readReply(r io.Reader) ([]byte, error) {
	var size uint32
	if err := binary.Read(r, binary.LittleEndian, &size); err != nil {
		return nil, fmt.Errorf("seaf-server does not answer: %w", err)
	}
	if size > maxReplySize {
		return nil, fmt.Errorf("seaf-server's answer cannot have %d bytes", size)
	}
	var data bytes.Buffer
	if _, err := io.CopyN(&data, r, int64(size)); err != nil {
		return nil, fmt.Errorf("seaf-server's answer breaks off: %w", err)
	}
	return data.Bytes(), nil
}

// ---- Self-check ----
//
// What -check does: it acts as seaf-server and as a client towards a server that runs, and
// says of each step whether it works, and if not, why and what to do. Each step is a method
// of checker that returns what to say; checker.print alone writes. It uses the parts above for
// the configuration, to sign tokens and to ask for group members, and has no lock and no
// goroutine of its own. It ends within 15 s.

// checkAgent is the User-Agent of -check. By it the server knows that what it refuses is no
// cause for a warning.
const checkAgent = "notification-server -check"

const (
	checkTime     = 14 * time.Second       // for all steps but the question for group members
	answerTime    = 4 * time.Second        // for one answer
	membersTime   = 300 * time.Millisecond // for seaf-server to say who is in a group
	checkLifetime = 5 * time.Minute        // of the tokens, as of seaf-server's
	clockLimit    = time.Minute            // by which the server's clock may differ
	maxAnswer     = 64 << 10               // bytes read of an answer
)

// A checker is one run of -check.
type checker struct {
	path     string // as given with -c
	getenv   func(string) string
	out      io.Writer
	client   *http.Client
	cfg      *config
	urls     []string          // by which clients come, one for each server; no slash at the end
	own      string            // URL of the server that cfg describes
	events   string            // URL to which senders post
	repoID   string            // random, so that no real client is disturbed
	sessions []*websocket.Conn // one for each of urls
	took     time.Duration     // from posting the event until it came everywhere
	notes    []string          // lines to print below the step that runs
	good     map[string]bool   // steps that worked
	direct   bool              // urls is own alone: no proxy is asked
	unposted bool              // no notification server of this key answered a post
	warned   bool
	failed   bool
	late     bool // no time is left
}

// A checkStep is one line of the output, or a few.
type checkStep struct {
	name  string
	needs string // a step that must have worked before, or ""
	posts bool   // a notification server must have answered a post
	do    func(ctx context.Context) (string, error)
}

// runCheck checks the server that the configuration in path describes, at the URLs by which
// clients come, or directly when there are none. It returns the exit status: 0 if
// notifications work, 1 if not.
func runCheck(path string, urls []string, getenv func(string) string, stdout io.Writer) int {
	log.SetOutput(io.Discard) // net/http's remarks on a service that speaks no HTTP
	ctx, cancel := context.WithTimeout(context.Background(), checkTime)
	defer cancel()
	c := newChecker(path, urls, getenv, stdout)
	defer c.close()
	for _, step := range []checkStep{
		{name: "configuration", do: c.configuration},
		{name: "senders", needs: "configuration", do: c.senders},
		{name: "ping", needs: "configuration", do: c.ping},
		{name: "upgrade", needs: "ping", do: c.upgrade},
		{name: "subscription", needs: "upgrade", do: c.subscription},
		{name: "event", needs: "subscription", do: c.event},
		{name: "forgery", needs: "ping", do: c.forgery, posts: true},
		{name: "group members", needs: "configuration", do: c.groupMembers},
		{name: "connection", needs: "event", do: c.connection},
	} {
		c.try(ctx, step)
	}
	if c.failed {
		c.print("It does not work: the first cross says why.")
		return 1
	}
	works := "It works"
	if c.warned {
		works = "It works, with warnings"
	}
	c.print("%s: a notification takes %v.", works, c.took)
	return 0
}

func newChecker(path string, urls []string, getenv func(string) string, stdout io.Writer) *checker {
	c := &checker{
		path:   path,
		getenv: getenv,
		out:    stdout,
		repoID: rand.Text(),
		good:   map[string]bool{"": true},
	}
	for _, url := range urls {
		c.urls = append(c.urls, trimPing(url))
	}
	c.client = &http.Client{
		Timeout: answerTime,
		// HTTP/1.1, as clients speak it, and not through a proxy of the environment's.
		Transport: &http.Transport{TLSClientConfig: &tls.Config{}},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse // clients and seaf-server follow none
		},
	}
	return c
}

// trimPing returns a URL without a slash or /ping at its end.
func trimPing(url string) string {
	return strings.TrimSuffix(strings.TrimRight(url, "/"), "/ping")
}

// try does a step and prints a line for what it found, or for each line of its error, and its
// notes below.
func (c *checker) try(ctx context.Context, step checkStep) {
	if !c.good[step.needs] || c.late || step.posts && c.unposted {
		c.print("- %s: not tried, since a step before it failed", step.name)
		return
	}
	c.notes = nil
	text, err := step.do(ctx)
	end, _ := ctx.Deadline()
	if err != nil && !time.Now().Before(end) {
		c.late = true // what err says is wrong then
		err = fmt.Errorf("the steps together took %v, and no more are waited for", checkTime)
	}
	if err == nil {
		c.good[step.name] = true
		c.print("✓ %s: %s", step.name, text)
	} else {
		c.failed = true
		for fault := range strings.Lines(err.Error()) {
			c.print("✗ %s: %s", step.name, strings.TrimSpace(fault))
		}
	}
	for _, note := range c.notes {
		c.print("  %s", note)
	}
}

// print is the one place that writes.
func (c *checker) print(format string, args ...any) {
	fmt.Fprintf(c.out, format+"\n", args...)
}

func (c *checker) close() {
	for _, ws := range c.sessions {
		ws.Close()
	}
	c.client.CloseIdleConnections()
}

// configuration loads the configuration and finds the URLs.
func (c *checker) configuration(context.Context) (string, error) {
	cfg, err := loadConfig(c.path, c.getenv, runPath)
	if err != nil {
		return "", err
	}
	if !cfg.enabled {
		return "", fmt.Errorf("%s says enabled = false: the server does not run", cfg.offFrom)
	}
	c.cfg = cfg
	c.own = "http://" + net.JoinHostPort(reachable(cfg.host), cfg.port)
	c.events = c.senderURL() + "/events"
	if len(c.urls) == 0 {
		c.urls = []string{c.own}
		c.direct = true
	}
	c.warned = len(cfg.warnings) > 0
	for _, warning := range cfg.warnings {
		c.notes = append(c.notes, "WARNING: "+warning)
	}
	return cfg.source, nil
}

// senders says what the programs that post events need, by the way of configuration that was
// found, and whether what can be seen of it from here is right. It sends nothing.
func (c *checker) senders(context.Context) (string, error) {
	if len(c.cfg.faults) > 0 {
		return "", errors.New(strings.Join(c.cfg.faults, "\n"))
	}
	if c.cfg.senders.environmentAlone {
		return c.sendersByEnvironment()
	}
	url := c.fileURL()
	c.noteElsewhere(url)
	return fmt.Sprintf("Seafile 10 to 12, by file: seaf-server needs enabled = true, host and "+
		"port in [notification] of %s; it posts to %s", c.cfg.file, url), nil
}

// sendersByEnvironment is for Seafile 12 to 14. The variables are those of the senders, which
// may run elsewhere: one that is not set here says nothing.
func (c *checker) sendersByEnvironment() (string, error) {
	enable, inner := c.cfg.senders.enableVariable, c.cfg.senders.innerURL
	var faults []error
	if enable != "" && enable != "true" {
		faults = append(faults, fmt.Errorf("environment variable ENABLE_NOTIFICATION_SERVER is "+
			"%q: seaf-server posts no events with that: set it to true, and restart Seafile",
			enable))
	}
	if inner != "" && !isHTTP(inner) {
		faults = append(faults, fmt.Errorf("environment variable INNER_NOTIFICATION_SERVER_URL is "+
			"%q: no URL to which seaf-server can post: write it as http://notification-server:%s",
			inner, c.cfg.port))
	}
	if faults != nil {
		return "", errors.Join(faults...)
	}
	if inner != "" {
		c.noteElsewhere(inner)
	}
	return fmt.Sprintf("Seafile 12 to 14, by environment: in 13 and 14 seaf-server needs "+
		"ENABLE_NOTIFICATION_SERVER=true (here: %s) and "+
		"INNER_NOTIFICATION_SERVER_URL=http://HOST:%s (here: %s); "+
		"in 12 it needs enabled = true, host and port in [notification] of seafile.conf",
		cmp.Or(enable, "not set"), c.cfg.port, cmp.Or(inner, "not set")), nil
}

// fileURL is where seaf-server 10 to 12 posts by seafile.conf. It takes host as it is written.
func (c *checker) fileURL() string {
	return fmt.Sprintf("http://%s:%d", c.cfg.senders.host, c.cfg.senders.port)
}

// noteElsewhere notes it if senders post to a URL at which this server does not listen.
func (c *checker) noteElsewhere(url string) {
	if c.isListenedAt(url) {
		return
	}
	c.notes = append(c.notes, fmt.Sprintf("note: senders post to %s, but the server listens on "+
		"%s: events get lost unless something there passes them on",
		url, net.JoinHostPort(c.cfg.host, c.cfg.port)))
}

// isListenedAt reports whether a URL leads to the address on which the server listens, as far
// as can be told without DNS. What has a path or is https leads to a proxy.
func (c *checker) isListenedAt(url string) bool {
	u, err := neturl.Parse(url)
	if err != nil {
		return false
	}
	if u.Scheme == "https" || strings.Trim(u.Path, "/") != "" {
		return true
	}
	if cmp.Or(u.Port(), "80") != c.cfg.port {
		return false
	}
	listens, posts := net.ParseIP(reachable(c.cfg.host)), net.ParseIP(reachable(u.Hostname()))
	return listens == nil || posts == nil || listens.Equal(posts) ||
		net.ParseIP(c.cfg.host).IsUnspecified()
}

// isHTTP reports whether url is an absolute URL of HTTP.
func isHTTP(url string) bool {
	u, err := neturl.Parse(url)
	return err == nil && u.Host != "" && (u.Scheme == "http" || u.Scheme == "https")
}

// senderURL is where the senders post, as far as it can be seen, or else c.own.
func (c *checker) senderURL() string {
	s := c.cfg.senders
	switch {
	case s.innerURL != "":
		return strings.TrimRight(s.innerURL, "/")
	case s.host != "" && s.port != 0:
		return c.fileURL()
	}
	return c.own
}

// reachable returns an address at which a server is reached that listens on host.
func reachable(host string) string {
	switch host {
	case "0.0.0.0", "localhost":
		return "127.0.0.1"
	case "::":
		return "::1"
	}
	return host
}

// ping asks as a client does when it starts.
func (c *checker) ping(ctx context.Context) (string, error) {
	var asked []string
	for _, url := range c.urls {
		if err := c.pingOne(ctx, url+"/ping"); err != nil {
			return "", err
		}
		asked = append(asked, url+"/ping")
	}
	return strings.Join(asked, ", ") + " answers pong", nil
}

func (c *checker) pingOne(ctx context.Context, url string) error {
	a, err := c.request(ctx, "GET", url, "", http.Header{})
	if err != nil {
		return err
	}
	if c.direct && !strings.Contains(a.text, `"pong"`) {
		return fmt.Errorf("another service listens there: %s answers %d, but not pong: stop it, "+
			"or correct host (%s) and port (%s)", url, a.status, c.cfg.hostFrom, c.cfg.portFrom)
	}
	if err := c.answeredByProxy(a); err != nil {
		return err
	}
	switch {
	case a.status == http.StatusBadRequest && strings.Contains(a.text, "HTTPS"):
		return fmt.Errorf("%s answers 400, since that port speaks TLS: "+
			"give the URL with https://", url)
	case a.status == http.StatusUnauthorized || a.status == http.StatusForbidden:
		return fmt.Errorf("%s answers %d: the proxy asks for a password, or blocks it: clients "+
			"have no password to give: let it do neither for /notification", url, a.status)
	case a.isPage():
		return fmt.Errorf("%s answers %d with a web page: Seahub or another service answers: the "+
			"proxy's rule for /notification is missing, or comes after the one for /", url, a.status)
	case !strings.Contains(a.text, `"pong"`):
		return fmt.Errorf("%s answers %d, but not pong: another service listens there: "+
			"correct host and port, here or in the proxy's rule", url, a.status)
	}
	date, err := http.ParseTime(a.date)
	if difference := time.Since(date); err == nil && difference.Abs() >= clockLimit {
		return fmt.Errorf("%s answers pong, but its clock differs from this machine's by %v, "+
			"and tokens expire by it: set both by NTP", url, difference.Round(time.Second))
	}
	return nil
}

// upgrade opens a WebSocket as the desktop client does, and as a browser does.
func (c *checker) upgrade(ctx context.Context) (string, error) {
	for _, url := range c.urls {
		err := c.upgradeOne(ctx, url, "the desktop client", "Sec-Websocket-Protocol", subprotocol)
		if err == nil {
			err = c.upgradeOne(ctx, url, "a browser", "Origin", "https://cloud.example.com")
		}
		if err != nil {
			return "", err
		}
	}
	return "goes through, for the desktop client and for a browser", nil
}

// upgradeOne sends an upgrade with the header that tells what kind of client asks.
func (c *checker) upgradeOne(ctx context.Context, url, kind, name, value string) error {
	a, err := c.request(ctx, "GET", url, "", http.Header{
		"Connection":            {"Upgrade"},
		"Upgrade":               {"websocket"},
		"Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key":     {base64.StdEncoding.EncodeToString([]byte(c.repoID[:16]))},
		name:                    {value},
	})
	if err != nil {
		return err
	}
	// Seahub answers 200 with a page, and Caddy without a body where it has no rule.
	if a.status == http.StatusNotFound || a.status == http.StatusOK || a.redirectsElsewhere() {
		return fmt.Errorf("%s answers %d, although %s/ping goes through: the proxy's rule lets "+
			"only what is below /notification through: write it for /notification, too (Caddy: "+
			"handle_path /notification* instead of handle_path "+
			"/notification/*)", url, a.status, url)
	}
	if err := c.answeredByProxy(a); err != nil {
		return err
	}
	if a.status != http.StatusSwitchingProtocols {
		return fmt.Errorf("as %s: %s answers %d, not 101: the proxy must pass on "+
			"the headers Upgrade and Connection, by HTTP/1.1", kind, url, a.status)
	}
	return nil
}

// subscription subscribes to a library with a good token and to another with a broken one.
// The server answers only the broken one.
func (c *checker) subscription(ctx context.Context) (string, error) {
	for _, url := range c.urls {
		ws, err := dial(ctx, url)
		if err != nil {
			return "", fmt.Errorf("%s: %w: no WebSocket, although an upgrade went through before: "+
				"see the server's log", url, err)
		}
		c.sessions = append(c.sessions, ws)
		claims := fmt.Sprintf(`{"exp":%d,"repo_id":%q,"username":"check@example.com"}`, expiry(), c.repoID)
		fmt.Fprintf(ws, `{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q},%s]}}`,
			c.repoID, sign(c.cfg.key, claims), brokenRepo)
		answer := receive(ctx, ws)
		switch {
		case !strings.Contains(answer, "jwt-expired"):
			return "", fmt.Errorf("%s answers %.60q to a broken token, not jwt-expired: another "+
				"service listens there: correct host and port, here or in the proxy's rule",
				url, answer)
		case strings.Contains(answer, c.repoID):
			return "", fmt.Errorf("%s refuses a token signed with this key: the running server "+
				"has another jwt_private_key (restart Seafile, so that all its programs read the "+
				"same one), or its clock is ahead by minutes: see its log", url)
		}
	}
	return "a good token is accepted, a broken one is answered jwt-expired", nil
}

// brokenRepo asks for a library with a token that no server accepts. Its answer shows that
// all before it was handled.
const brokenRepo = `{"id":"broken","jwt_token":"x.y.z"}`

// dial opens a WebSocket as a browser does: desktop clients are told an update twice.
func dial(ctx context.Context, url string) (*websocket.Conn, error) {
	cfg, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), url)
	if err != nil {
		return nil, err
	}
	cfg.Header.Set("User-Agent", checkAgent)
	ws, err := cfg.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	ws.MaxPayloadBytes = maxAnswer
	end, _ := ctx.Deadline()
	ws.SetWriteDeadline(end)
	return ws, nil
}

// receive returns the next message, or "" if none comes in time.
func receive(ctx context.Context, ws *websocket.Conn) string {
	deadline := time.Now().Add(answerTime)
	if end, _ := ctx.Deadline(); end.Before(deadline) {
		deadline = end
	}
	ws.SetReadDeadline(deadline)
	var text string
	if err := websocket.Message.Receive(ws, &text); err != nil {
		return ""
	}
	return text
}

// expiry is when the tokens of -check expire, in Unix seconds.
func expiry() int64 { return time.Now().Add(checkLifetime).Unix() }

// event posts an event as seaf-server does; it must come to each subscription.
func (c *checker) event(ctx context.Context) (string, error) {
	start := time.Now()
	a, err := c.post(ctx, fmt.Sprintf(`{"exp":%d}`, expiry()))
	if err != nil {
		c.unposted = true
		return "", err
	}
	if a.status != http.StatusOK {
		return "", fmt.Errorf("%s answers %d to an event, not 200: %.300q: another service, or "+
			"the server that Seafile ships, listens there", c.events, a.status, a.text)
	}
	for i, ws := range c.sessions {
		if !strings.Contains(receive(ctx, ws), c.repoID) {
			return "", fmt.Errorf("posted to %s and answered 200, but it did not come back over "+
				"%s: they lead to different servers (in a cluster: nginx does not mirror events to it)",
				c.events, c.urls[i])
		}
	}
	c.took = time.Since(start).Round(100 * time.Microsecond)
	return fmt.Sprintf("posted to %s, it arrived after %v", c.events, c.took), nil
}

// forgery posts events with tokens that the same key signs, but not for events.
func (c *checker) forgery(ctx context.Context) (string, error) {
	for _, forged := range []struct{ token, claims string }{
		{"a client's token", fmt.Sprintf(
			`{"exp":%d,"repo_id":%q,"username":"check@example.com"}`, expiry(), c.repoID)},
		// Seahub gives this one to visitors without an account. Real ones are valid for 3
		// days; this one for minutes, so that it is not refused for that alone.
		{"a document's token", fmt.Sprintf(
			`{"file_uuid":"00000000-0000-4000-8000-000000000000","filename":"check.sdoc","username":"",`+
				`"name":"","avatar_url":"","permission":"r","default_title":"","exp":%d}`, expiry())},
	} {
		a, err := c.post(ctx, forged.claims)
		switch {
		case err != nil:
			return "", err
		case a.status == http.StatusForbidden:
		case strings.Contains(a.text, "pong"):
			return "", fmt.Errorf("%s: the first server of the cluster, whose answer to an event "+
				"counts, is down: start it", c.events)
		default:
			return "", fmt.Errorf("%s answers %d to an event posted with %s, not 403, so such "+
				"events can be forged: another service, or the server that Seafile ships, listens "+
				"there",
				c.events, a.status, forged.token)
		}
	}
	return "an event posted with a client's token, or with a document's, is refused", nil
}

// post posts an event with a token of these claims: a change of a lock, since a newer update would
// replace an update. An error means that nobody answered, a proxy did, or the token is not good.
func (c *checker) post(ctx context.Context, claims string) (*checkAnswer, error) {
	body := fmt.Sprintf(`{"type":"file-lock-changed","content":{"repo_id":%q,"path":"/check",`+
		`"change_event":"locked","lock_user":"check@example.com"}}`, c.repoID)
	a, err := c.request(ctx, "POST", c.events, body, http.Header{
		"Authorization": {"Token " + sign(c.cfg.key, claims)},
		"Content-Type":  {"application/json"},
	})
	if err != nil {
		return nil, err
	}
	if err := c.answeredByProxy(a); err != nil {
		return nil, err
	}
	if a.status == http.StatusUnauthorized {
		return nil, fmt.Errorf("%s answers 401: %.300q", c.events, a.text)
	}
	return a, nil
}

// groupMembers asks seaf-server who is in a group. Only Seafile Pro has permissions of
// folders, so that it does not answer is no fault.
func (c *checker) groupMembers(context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), membersTime)
	defer cancel()
	g := newGroups(c.cfg.seafileSocket, c.cfg.sockets[:1])
	if _, err := g.members(ctx, 1); err != nil && !errors.Is(err, errUnknownGroup) {
		return fmt.Sprintf("not needed in the Community Edition; Pro: %v; until then clients "+
			"reconnect when a folder's permission changes for a group", err), nil
	}
	return "seaf-server answers on " + c.cfg.seafileSocket(), nil
}

// connection shows that the connections are still open, and that the event came once.
func (c *checker) connection(ctx context.Context) (string, error) {
	for i, ws := range c.sessions {
		if w, err := ws.NewFrameWriter(websocket.PingFrame); err == nil {
			w.Write([]byte("check")) // an error shows in the answer
		}
		fmt.Fprintf(ws, `{"type":"subscribe","content":{"repos":[%s]}}`, brokenRepo)
		answer := receive(ctx, ws)
		switch {
		case strings.Contains(answer, c.repoID):
			return "", fmt.Errorf("%s: the event came twice, or a forged one came: "+
				"nginx mirrors it twice to this server, or it is not this server", c.urls[i])
		case !strings.Contains(answer, "broken"):
			return "", fmt.Errorf("%s: no answer after a ping: the proxy closes connections early",
				c.urls[i])
		}
	}
	return "still open after a ping", nil
}

// A checkAnswer is an answer to one request of -check.
type checkAnswer struct {
	url      *neturl.URL // that was asked
	status   int
	date     string
	location *neturl.URL // where it redirects to, or nil
	text     string      // of the body, at most maxAnswer bytes
}

// isPage reports whether the body is a page for people.
func (a *checkAnswer) isPage() bool { return strings.Contains(a.text, "<html") }

// redirectsElsewhere reports whether it redirects to another path, a slash at the end aside.
func (a *checkAnswer) redirectsElsewhere() bool {
	return a.location != nil &&
		strings.TrimRight(a.location.Path, "/") != strings.TrimRight(a.url.Path, "/")
}

// request sends a request. An error says why there is no answer.
func (c *checker) request(
	ctx context.Context, method, url, body string, header http.Header,
) (*checkAnswer, error) {
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil || !isHTTP(url) {
		return nil, fmt.Errorf("%q is no URL as https://cloud.example.com/notification", url)
	}
	r.Header = header
	r.Header.Set("User-Agent", checkAgent)
	response, err := c.client.Do(r)
	if err != nil {
		return nil, c.explainNoAnswer(err)
	}
	defer response.Body.Close()
	a := &checkAnswer{url: r.URL, status: response.StatusCode, date: response.Header.Get("Date")}
	if a.status == http.StatusSwitchingProtocols {
		return a, nil
	}
	if to, err := response.Location(); err == nil && a.status > 300 && a.status < 400 {
		a.location = to
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return nil, c.explainNoAnswer(fmt.Errorf("%s: the answer breaks off: %w", url, err))
	}
	a.text = strings.TrimSpace(string(text))
	return a, nil
}

// explainNoAnswer adds to the error of a request what it means and what to do.
func (c *checker) explainNoAnswer(err error) error {
	var noAddress *net.DNSError
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	var unverified *tls.CertificateVerificationError
	var late net.Error
	remedy := "no way leads there, another service listens there, " +
		"the proxy does not serve this name, or it is https for http, or the reverse"
	if c.direct {
		remedy = "another service listens there, or no way leads there: correct host and port"
	}
	switch {
	case errors.As(err, &noAddress):
		remedy = "DNS has no address for the name: check its spelling, and DNS"
	case errors.Is(err, syscall.ECONNREFUSED):
		remedy = "nothing listens there: start the notification server (or the proxy), " +
			"or correct host and port"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		remedy = "renew the proxy's certificate, and check this machine's clock"
	case errors.As(err, &unknown) && !hasAuthorities():
		remedy = "no CA certificates found here, so none can be trusted: install ca-certificates, " +
			"or name a file of them in SSL_CERT_FILE; in a container, mount one"
	case errors.As(err, &unverified):
		remedy = "the certificate is not trusted: let the proxy send the whole chain, " +
			"for this name, of an authority that clients know"
	case errors.As(err, &late) && late.Timeout():
		remedy = fmt.Sprintf("no answer in %v: look for a firewall between", answerTime)
	}
	return fmt.Errorf("%w: %s", err, remedy)
}

// hasAuthorities reports whether this machine has any CA certificate.
func hasAuthorities() bool {
	pool, err := x509.SystemCertPool()
	return err == nil && !pool.Equal(x509.NewCertPool())
}

// answeredByProxy returns an error if a notification server never answers like this.
func (c *checker) answeredByProxy(a *checkAnswer) error {
	switch {
	case a.redirectsElsewhere():
		return fmt.Errorf("%s redirects to %s, a web page: Seahub or another service answers: the "+
			"proxy's rule for /notification is missing, or comes after the one for /",
			a.url, a.location)
	case a.location != nil && a.location.Path != a.url.Path:
		return fmt.Errorf("%s redirects to %s, but clients do not follow: write the proxy's rule "+
			"for /notification without a slash at its end", a.url, a.location)
	case a.location != nil:
		right := strings.TrimSuffix(trimPing(a.location.String()), "/events")
		return fmt.Errorf("%s redirects to %s, but clients do not follow: give %s here, to the "+
			"clients or in INNER_NOTIFICATION_SERVER_URL", a.url, a.location, right)
	case a.status == http.StatusNotFound:
		return fmt.Errorf("%s answers 404: the proxy's rule for /notification is missing or does "+
			"not match, the URL lacks /notification, or another service listens there", a.url)
	case a.status >= http.StatusBadGateway:
		return fmt.Errorf("%s answers %d: the proxy cannot reach the notification server (by this "+
			"configuration it is at %s), or that has no room for more clients (see its log)",
			a.url, a.status, c.own)
	}
	return nil
}

// ---- Metrics ----
//
// Counters of what happened, and the text format of Prometheus. A new counter is a field of
// metrics, a line in newMetrics and one in write. What the hub and the log know at this moment
// comes in as gauges: a new one is a field there, set in hub.gauges or server.writeMetrics, and a
// line in write. Each counter has its own lock, under which no other is taken. It has no
// goroutine.

// A labelCounter counts by the value of one label. The values must come from a small set.
type labelCounter struct {
	name, label, help string

	mu     sync.Mutex // guards counts
	counts map[string]uint64
}

func newLabelCounter(name, label, help string) *labelCounter {
	return &labelCounter{name: name, label: label, help: help, counts: map[string]uint64{}}
}

// add counts one more.
func (c *labelCounter) add(value string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[value]++
}

func (c *labelCounter) count(value string) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts[value]
}

// write writes one sample for each value of the label, sorted.
func (c *labelCounter) write(w io.Writer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	writeFamily(w, c.name, "counter", c.help)
	for _, value := range slices.Sorted(maps.Keys(c.counts)) {
		fmt.Fprintf(w, "%s{%s=%q} %d\n", c.name, c.label, value, c.counts[value])
	}
}

// deliveryBounds are the upper bounds of the buckets of delivery_seconds, in seconds. Above
// the last one there is one more.
var deliveryBounds = [...]float64{.001, .005, .01, .05, .1, .5, 1, 5, 30}

// metrics are what /metrics shows. All methods may be called at the same time.
type metrics struct {
	started time.Time
	events  *labelCounter // by type
	refused *labelCounter // by reason
	closed  *labelCounter // by reason
	lookups *labelCounter // by result
	mu      sync.Mutex    // guards the fields below
	buckets [len(deliveryBounds) + 1]uint64
	seconds float64 // sum of all deliveries
}

// gauges are the figures of this moment that other parts know.
type gauges struct {
	connections     int
	subscriptions   int
	libraries       int // with at least one subscription
	waiting         int // events that wait for group members
	remembered      int // updates that are sent to new subscriptions
	logLinesDropped int // since the start
}

// outboxFull is the reason in closed for a client that is too slow. A metric of its own
// shows it, too.
const outboxFull = "outbox-full"

func newMetrics(started time.Time) *metrics {
	return &metrics{
		started: started,
		events: newLabelCounter("seafile_notification_events_total", "type",
			"Events accepted."),
		refused: newLabelCounter("seafile_notification_refused_total", "reason",
			"Events, subscriptions and clients refused."),
		closed: newLabelCounter("seafile_notification_closed_total", "reason",
			"Connections ended."),
		lookups: newLabelCounter("seafile_notification_group_lookups_total", "result",
			"Questions for the members of a group."),
	}
}

// delivered counts a delivery by the time between accepting the event and having written it.
func (m *metrics) delivered(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i, _ := slices.BinarySearch(deliveryBounds[:], d.Seconds())
	m.buckets[i]++
	m.seconds += d.Seconds()
}

// write writes all metrics in Prometheus' text format.
func (m *metrics) write(w io.Writer, g gauges) {
	var text strings.Builder
	writeGauge(&text, "seafile_notification_connections",
		"Clients connected by WebSocket.", g.connections)
	writeGauge(&text, "seafile_notification_subscriptions",
		"Subscriptions of clients to libraries.", g.subscriptions)
	writeGauge(&text, "seafile_notification_libraries",
		"Libraries with at least one subscription.", g.libraries)
	writeGauge(&text, "seafile_notification_waiting_events",
		"Events that wait for group members.", g.waiting)
	writeGauge(&text, "seafile_notification_remembered_updates",
		"Updates that new subscriptions are told.", g.remembered)
	m.events.write(&text)
	m.refused.write(&text)
	m.closed.write(&text)
	m.lookups.write(&text)
	m.writeDeliveries(&text)
	writeCounter(&text, "seafile_notification_outbox_full_total",
		"Clients closed since they were too slow.", m.closed.count(outboxFull))
	writeCounter(&text, "seafile_notification_log_lines_dropped_total",
		"Lines of the log that were dropped.", g.logLinesDropped)
	writeGauge(&text, "process_start_time_seconds",
		"Start of the process, in Unix time.", m.started.Unix())
	writeGauge(&text, "process_resident_memory_bytes", "Resident memory.", residentBytes())
	writeGauge(&text, "go_goroutines", "Goroutines.", runtime.NumGoroutine())
	io.WriteString(w, text.String())
}

// writeDeliveries writes the histogram of deliveries, and their number on its own.
func (m *metrics) writeDeliveries(w io.Writer) {
	const name = "seafile_notification_delivery_seconds"
	m.mu.Lock()
	defer m.mu.Unlock()
	writeFamily(w, name, "histogram",
		"Time from accepting or repeating an event to having written it to a client.")
	count := uint64(0)
	for i, n := range m.buckets {
		count += n
		bound := "+Inf"
		if i < len(deliveryBounds) {
			bound = strconv.FormatFloat(deliveryBounds[i], 'g', -1, 64)
		}
		fmt.Fprintf(w, "%s_bucket{le=%q} %d\n", name, bound, count)
	}
	fmt.Fprintf(w, "%s_sum %v\n", name, m.seconds)
	fmt.Fprintf(w, "%s_count %d\n", name, count)
	writeCounter(w, "seafile_notification_deliveries_total", "Events written to clients.", count)
}

func writeGauge(w io.Writer, name, help string, value any) {
	writeFamily(w, name, "gauge", help)
	fmt.Fprintf(w, "%s %v\n", name, value)
}

func writeCounter(w io.Writer, name, help string, value any) {
	writeFamily(w, name, "counter", help)
	fmt.Fprintf(w, "%s %v\n", name, value)
}

// writeFamily writes the lines above the samples of a metric.
func writeFamily(w io.Writer, name, kind, help string) {
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// residentBytes returns the bytes of memory that the process takes, 0 where /proc does
// not tell.
func residentBytes() int64 {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(statm))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

// ---- Log ----
//
// Lines that Seafile's log tools read. A caller puts its line into a queue and goes on; one
// goroutine, logger.writeLoop, writes to files, so that a pipe that nobody reads, a FIFO or a
// disk that hangs holds up nothing but the log. When the queue is full, lines are dropped and
// counted. No line holds what could break a line or a terminal, wherever its text comes from.
//
// INFO is the start with its settings, or that it is disabled, the stop, the metrics upon
// SIGUSR2, and what a self-check is refused. WARNING is what is wrong with the configuration,
// that lines are missing, and, at most once a minute for each cause, what is refused, which client
// was too slow, which group is not known, that too much waits for one, and net/http's remarks.
// ERROR is what ends the server or a part of it, and bugs. DEBUG is each connection and message.
//
// logger.mu guards the queue. It is held for moments: no other lock is taken under it, and
// nothing is written. logger.close ends writeLoop, unless that hangs in a write.

const (
	maxLogQueue   = 8 << 20                // bytes that wait, and as many that are being written
	logLookPeriod = 5 * time.Second        // between two looks at the path of the log file
	logWriteWait  = 2 * time.Second        // for a FIFO whose reader does not read
	logEndWait    = 100 * time.Millisecond // to write what is left, at the end
	logOncePeriod = time.Minute            // see warnOnce
	maxLogKeys    = 1000                   // of takeMinute
)

// A logger writes lines in the background. Its methods never wait, except close, and may
// be called at the same time.
type logger struct {
	path   string // of the log file, "" for none
	prefix string // of each line
	stderr io.Writer
	uptime func() time.Duration
	level  slog.LevelVar // lines below it are not logged

	wakes  chan struct{} // asks writeLoop to look and to write
	ending chan struct{} // closed by close
	ended  chan struct{} // closed by writeLoop
	closed sync.Once

	// For writeLoop alone.
	out         io.Writer
	file        *os.File // the same, if it is the log file, else nil
	taken       []byte   // from queue, to be written
	failing     bool     // the last write failed, and this was reported
	cannotOpen  bool     // the log file cannot be opened, and this was reported
	stderrHangs bool     // nobody reads standard error

	mu      sync.Mutex               // guards the fields below
	queue   []byte                   // whole lines
	missing int                      // lines dropped since the last one in queue
	dropped int                      // lines dropped since the start
	quiet   map[string]time.Duration // by key: uptime until which warnOnce is silent
}

// openLog returns a logger at level info that writes to standard output, or to the file at
// path, or, if path is "" or "-", to standard error. A file that cannot be opened is tried
// again with the next line, and every 5 s; until then the lines go to standard error.
func openLog(
	path string, toStdout bool, stdout, stderr io.Writer, uptime func() time.Duration,
) *logger {
	lg := &logger{
		stderr: stderr,
		uptime: uptime,
		wakes:  make(chan struct{}, 1),
		ending: make(chan struct{}),
		ended:  make(chan struct{}),
		out:    stderr,
		quiet:  map[string]time.Duration{},
	}
	if toStdout {
		lg.out = stdout
		lg.prefix = "[notification-server] "
	} else if path != "-" {
		lg.path = path
	}
	lg.wake() // so that it opens the file at once
	go lg.writeLoop()
	return lg
}

// setLevel sets the lowest level that is logged.
func (lg *logger) setLevel(level slog.Level) { lg.level.Set(level) }

// debugEnabled tells whether debugf logs. Where many lines are made, ask it first: debugf
// alone saves the line, but not its arguments.
func (lg *logger) debugEnabled() bool { return lg.level.Level() <= slog.LevelDebug }

func (lg *logger) debugf(format string, args ...any) { lg.printf(slog.LevelDebug, format, args...) }
func (lg *logger) infof(format string, args ...any)  { lg.printf(slog.LevelInfo, format, args...) }
func (lg *logger) warnf(format string, args ...any)  { lg.printf(slog.LevelWarn, format, args...) }
func (lg *logger) errorf(format string, args ...any) { lg.printf(slog.LevelError, format, args...) }

// warnOnce is warnf, at most once a minute for each key. Keys must come from a small set.
func (lg *logger) warnOnce(key, format string, args ...any) {
	if lg.takeMinute(key) {
		lg.warnf(format, args...)
	}
}

// takeMinute reports whether no other line with this key was logged in the last minute. The caller
// must log one then.
func (lg *logger) takeMinute(key string) bool {
	uptime := lg.uptime()
	lg.mu.Lock()
	defer lg.mu.Unlock()
	if uptime < lg.quiet[key] {
		return false
	}
	if len(lg.quiet) >= maxLogKeys {
		clear(lg.quiet) // rather say something twice than remember without bounds
	}
	lg.quiet[key] = uptime + logOncePeriod
	return true
}

// Write logs what net/http has to say, see http.Server.ErrorLog: each remark once a minute, since
// strangers can cause some. Their first 20 bytes tell them apart.
func (lg *logger) Write(p []byte) (int, error) {
	text := string(bytes.TrimSpace(p))
	lg.warnOnce(text[:min(len(text), 20)], "%s", text)
	return len(p), nil
}

// wake has writeLoop look at the path of the log file and write, once more.
func (lg *logger) wake() {
	select {
	case lg.wakes <- struct{}{}:
	default: // it will do so anyway
	}
}

// linesDropped tells how many lines were dropped.
func (lg *logger) linesDropped() int {
	lg.mu.Lock()
	defer lg.mu.Unlock()
	return lg.dropped
}

// close waits until all lines are written, but at most 100 ms.
func (lg *logger) close() {
	lg.closed.Do(func() { close(lg.ending) })
	select {
	case <-lg.ended:
	case <-time.After(logEndWait):
	}
}

// printf puts a line into the queue, or drops it when that is full.
func (lg *logger) printf(level slog.Level, format string, args ...any) {
	if level < lg.level.Level() {
		return
	}
	line := lg.line(level, format, args...)
	lg.mu.Lock()
	defer lg.mu.Unlock()
	if len(lg.queue)+len(line) > maxLogQueue {
		lg.missing++
		lg.dropped++
		return
	}
	if lg.missing > 0 {
		missing := lg.line(slog.LevelWarn, "lines are missing here: %d: "+
			"the log could not be written, or not fast enough", lg.missing)
		lg.queue = append(lg.queue, missing...)
		lg.missing = 0
	}
	lg.queue = append(lg.queue, line...)
	lg.wake()
}

// line returns a line with the time of now.
func (lg *logger) line(level slog.Level, format string, args ...any) string {
	name := level.String()
	if level == slog.LevelWarn {
		name = "WARNING"
	}
	now := time.Now().Format(time.DateTime)
	text := escape(fmt.Sprintf(format, args...))
	return lg.prefix + "[" + now + "] [" + name + "] " + text + "\n"
}

// escape replaces what could break a line or a terminal as Go's strconv.Quote does: control
// characters, other separators of lines, marks that change the direction of writing, all
// else that cannot be seen, and what is not UTF-8. Backslashes stay as they are.
func escape(text string) string {
	var escaped []byte
	done := 0 // bytes of text
	for i, r := range text {
		if strconv.IsPrint(r) && r != utf8.RuneError {
			continue
		}
		_, size := utf8.DecodeRuneInString(text[i:])
		quoted := strconv.Quote(text[i : i+size]) // leaves U+FFFD itself as it is
		escaped = append(escaped, text[done:i]...)
		escaped = append(escaped, quoted[1:len(quoted)-1]...)
		done = i + size
	}
	return string(escaped) + text[done:]
}

// writeLoop opens the log file and writes what is queued, until close is called.
func (lg *logger) writeLoop() {
	defer close(lg.ended)
	ticks := time.NewTicker(logLookPeriod)
	defer ticks.Stop()
	for ending := false; !ending; {
		select {
		case <-lg.wakes:
		case <-ticks.C:
		case <-lg.ending:
			ending = true
		}
		lg.writeQueue()
	}
	if lg.file != nil {
		lg.file.Close()
	}
}

// look opens the log file if its path leads elsewhere than to the one that is open. Docker's
// Seafile renames the log each night, and deletes it after a week, without a signal. Where
// that fails, lines go where they went before.
func (lg *logger) look() {
	if lg.path == "" || lg.isOpen() {
		return
	}
	// O_NONBLOCK: a FIFO without a reader is an error then, and hangs otherwise.
	const flags = os.O_APPEND | os.O_CREATE | os.O_WRONLY | syscall.O_NONBLOCK
	file, err := os.OpenFile(lg.path, flags, 0o640)
	if err != nil {
		if !lg.cannotOpen {
			lg.reportFault("cannot open the log: %v: serving goes on, and the log goes where "+
				"it went before, at the start to standard error; correct it: "+
				"it is tried again every %v", err, logLookPeriod)
		}
		lg.cannotOpen = true
		return
	}
	lg.cannotOpen = false
	if lg.file != nil {
		lg.file.Close()
	}
	lg.out, lg.file = file, file
}

// isOpen tells whether the open file is the one at path.
func (lg *logger) isOpen() bool {
	if lg.file == nil {
		return false
	}
	opened, err := lg.file.Stat()
	if err != nil {
		return false
	}
	atPath, err := os.Stat(lg.path)
	return err == nil && os.SameFile(opened, atPath)
}

// writeQueue writes all that is queued. What cannot be written is tried again with the next
// line, and every 5 s.
func (lg *logger) writeQueue() {
	for {
		lg.look()
		if len(lg.taken) == 0 {
			lg.mu.Lock()
			lg.taken = lg.queue
			lg.queue = nil
			lg.mu.Unlock()
		}
		if len(lg.taken) == 0 || !lg.writeTaken() {
			return
		}
	}
}

// writeTaken writes what was taken from the queue, and reports whether that worked.
func (lg *logger) writeTaken() bool {
	for len(lg.taken) > 0 {
		if lg.file != nil {
			lg.file.SetWriteDeadline(time.Now().Add(logWriteWait)) // only a FIFO has one
		}
		// One line at a time, so that on a pipe no other process writes into it.
		n, err := lg.out.Write(lg.taken[:bytes.IndexByte(lg.taken, '\n')+1])
		lg.taken = lg.taken[n:]
		if err != nil {
			if !lg.failing {
				lg.reportFault("cannot write the log: %v: serving goes on; "+
					"make room, or correct it: then the log goes on", err)
			}
			lg.failing = true
			return false
		}
		lg.failing = false
	}
	return true
}

// reportFault says on standard error what the log cannot. If nobody reads that, it goes on, and
// does not try again.
func (lg *logger) reportFault(format string, args ...any) {
	if lg.stderrHangs {
		return
	}
	text := "notification-server: " + escape(fmt.Sprintf(format, args...)) + "\n"
	lg.stderrHangs = !writeSoon(lg.stderr, text)
}
