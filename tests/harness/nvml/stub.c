/* A libnvidia-ml.so.1 without GPUs: what nvidia-ml-py calls here, answered from files that a test writes.
 *
 * The directory is $MESHCTL_NVML_STUB, read by nvmlInit. In it:
 *   gpus          a line per GPU, in order of index; replaced as a whole, read at every call:
 *                 UUID MEMORY_BYTES MAJOR MINOR DEVICE_MINOR(-1: none) MIG(-1: not supported) FAULT PRODUCT...
 *                 FAULT: "ok", "no-events", "hang" (calls for this GPU hang while it says so) or an NVML error's number;
 *                 "hang@FUNCTION" and "NUMBER@FUNCTION" concern that function only
 *   init          an NVML error's number: what nvmlInit returns. Not there: 0
 *   xids          a line per event, appended: UUID CODE; each is told once, to whoever listens to that GPU
 *   mode-UUID     the GPU's compute mode, written by nvmlDeviceSetComputeMode. Not there: 0
 *   pids-UUID, mps-UUID   IDs of processes, one in a line: those that compute, and clients of MPS
 *   old           there: the functions that came with driver 510 are not
 *
 * A device's handle stands for its index, and the GPU that had it when it was first asked for. No header is included,
 * so that any C compiler can make it where no development files of libc are installed.
 */
typedef unsigned long size_t;
typedef struct stream stream;
extern char *getenv(const char *);
extern stream *fopen(const char *, const char *);
extern int fclose(stream *);
extern char *fgets(char *, int, stream *);
extern int fprintf(stream *, const char *, ...);
extern int snprintf(char *, size_t, const char *, ...);
extern int sscanf(const char *, const char *, ...);
extern int strcmp(const char *, const char *);
extern int strncmp(const char *, const char *, size_t);
extern char *strchr(const char *, int);
extern int atoi(const char *);
extern int rename(const char *, const char *);
extern int usleep(unsigned);

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, TIMEOUT = 10 };
enum { FUNCTION_NOT_FOUND = 13, GPU_IS_LOST = 15, UNKNOWN = 999 };
enum { MOST = 32, LINE = 512, XID = 8, POLL_US = 5000 };

typedef struct { char uuid[96]; } device;
typedef struct { int used, registered[MOST]; } event_set;
typedef struct { device *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } event;
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process;
typedef struct { char uuid[96], fault[96], product[128]; unsigned long long bytes; int major, minor, number, mig; } gpu;

static char directory[400];
static int inits;
static device devices[MOST];
static event_set sets[8];
static int told; /* lines of xids */

static stream *opened(const char *name, const char *uuid, const char *how) {
  char path[LINE];
  snprintf(path, sizeof path, "%s/%s%s", directory, name, uuid);
  return fopen(path, how);
}

/* The number in a file, or 0. */
static int number_in(const char *name, const char *uuid) {
  char line[LINE] = "";
  stream *file = opened(name, uuid, "r");
  if (!file) return 0;
  fgets(line, sizeof line, file);
  fclose(file);
  return atoi(line);
}

/* Reads the GPU at `index`, or the one of `uuid`; returns its index, -1 when there is none. */
static int find(int index, const char *uuid, gpu *found) {
  char line[LINE];
  int at = -1, here = 0;
  stream *file = opened("gpus", "", "r");
  if (!file) return -1;
  while (at < 0 && fgets(line, sizeof line, file)) {
    if (sscanf(line, "%95s %llu %d %d %d %d %95s %127[^\n]", found->uuid, &found->bytes, &found->major, &found->minor,
               &found->number, &found->mig, found->fault, found->product) != 8) continue;
    if (uuid ? !strcmp(uuid, found->uuid) : index == here) at = here;
    here++;
  }
  fclose(file);
  return at;
}

/* What every call for a device begins with; hangs while the GPU hangs. */
static int asked(device *d, gpu *found, const char *function) {
  if (!inits) return UNINITIALIZED;
  if (!d || d < devices || d >= devices + MOST) return INVALID_ARGUMENT;
  for (;; usleep(POLL_US)) {
    if (find(0, d->uuid, found) < 0) return GPU_IS_LOST;
    char *of = strchr(found->fault, '@');
    if (of && strcmp(of + 1, function)) return SUCCESS;
    if (strncmp(found->fault, "hang", 4)) return atoi(found->fault);
  }
}

static void copy(char *to, unsigned size, const char *from) { snprintf(to, size, "%s", from); }

int nvmlInitWithFlags(unsigned flags) {
  const char *where = getenv("MESHCTL_NVML_STUB");
  (void)flags;
  if (!where) return UNKNOWN;
  if (!inits || strcmp(directory, where)) {
    told = 0;
    for (int i = 0; i < MOST; i++) devices[i].uuid[0] = 0;
  }
  copy(directory, sizeof directory, where);
  int error = number_in("init", "");
  if (!error) inits++;
  return error;
}

int nvmlShutdown(void) { return inits ? (inits--, SUCCESS) : UNINITIALIZED; }

const char *nvmlErrorString(int error) {
  static char text[32];
  snprintf(text, sizeof text, "error %d of the stub", error);
  return text;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
  if (!inits) return UNINITIALIZED;
  copy(version, size, "570.00.stub");
  return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
  gpu any;
  if (!inits) return UNINITIALIZED;
  for (*count = 0; find((int)*count, 0, &any) >= 0;) ++*count;
  return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **d) {
  gpu found;
  if (!inits) return UNINITIALIZED;
  if (index >= MOST) return INVALID_ARGUMENT;
  if (!devices[index].uuid[0]) {
    if (find((int)index, 0, &found) < 0) return INVALID_ARGUMENT;
    copy(devices[index].uuid, sizeof devices[index].uuid, found.uuid);
  }
  *d = &devices[index];
  return asked(*d, &found, __func__);
}

int nvmlDeviceGetUUID(device *d, char *uuid, unsigned size) {
  gpu found;
  int error = asked(d, &found, __func__);
  if (!error) copy(uuid, size, found.uuid);
  return error;
}

int nvmlDeviceGetName(device *d, char *name, unsigned size) {
  gpu found;
  int error = asked(d, &found, __func__);
  if (!error) copy(name, size, found.product);
  return error;
}

int nvmlDeviceGetMemoryInfo(device *d, memory *m) {
  gpu found;
  int error = asked(d, &found, __func__);
  if (error) return error;
  m->total = m->free = found.bytes;
  m->used = 0;
  return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(device *d, int *major, int *minor) {
  gpu found;
  int error = asked(d, &found, __func__);
  if (error) return error;
  *major = found.major;
  *minor = found.minor;
  return SUCCESS;
}

int nvmlDeviceGetMinorNumber(device *d, unsigned *minor) {
  gpu found;
  int error = asked(d, &found, __func__);
  if (error || found.number < 0) return error ? error : NOT_SUPPORTED;
  *minor = (unsigned)found.number;
  return SUCCESS;
}

int nvmlDeviceGetMigMode(device *d, unsigned *now, unsigned *pending) {
  gpu found;
  int error = asked(d, &found, __func__);
  if (error || found.mig < 0) return error ? error : NOT_SUPPORTED;
  *now = *pending = (unsigned)found.mig;
  return SUCCESS;
}

int nvmlDeviceGetComputeMode(device *d, unsigned *mode) {
  gpu found;
  int error = asked(d, &found, __func__);
  if (!error) *mode = (unsigned)number_in("mode-", found.uuid);
  return error;
}

int nvmlDeviceSetComputeMode(device *d, unsigned mode) {
  gpu found;
  int error = asked(d, &found, __func__);
  if (error) return error;
  char new[LINE], path[LINE];
  snprintf(new, sizeof new, "%s/.mode-%s.new", directory, found.uuid);
  snprintf(path, sizeof path, "%s/mode-%s", directory, found.uuid);
  stream *file = fopen(new, "w");
  if (!file) return 4; /* no permission */
  fprintf(file, "%u\n", mode);
  fclose(file);
  return rename(new, path) ? 4 : SUCCESS;
}

static int processes(const char *function, const char *name, int new, device *d, unsigned *count, process *all) {
  char line[LINE];
  unsigned there = 0;
  gpu found;
  int error = asked(d, &found, function);
  if (error) return error;
  if (new) {
    stream *old = opened("old", "", "r");
    if (old) return fclose(old), FUNCTION_NOT_FOUND;
  }
  stream *file = opened(name, found.uuid, "r");
  for (; file && fgets(line, sizeof line, file); there++)
    if (there < *count) all[there] = (process){(unsigned)atoi(line), 0, 0, 0};
  if (file) fclose(file);
  error = there > *count ? INSUFFICIENT_SIZE : SUCCESS;
  *count = there;
  return error;
}

int nvmlDeviceGetComputeRunningProcesses_v2(device *d, unsigned *n, process *p) {
  return processes(__func__, "pids-", 0, d, n, p);
}
int nvmlDeviceGetComputeRunningProcesses_v3(device *d, unsigned *n, process *p) {
  return processes(__func__, "pids-", 1, d, n, p);
}
int nvmlDeviceGetMPSComputeRunningProcesses_v2(device *d, unsigned *n, process *p) {
  return processes(__func__, "mps-", 0, d, n, p);
}
int nvmlDeviceGetMPSComputeRunningProcesses_v3(device *d, unsigned *n, process *p) {
  return processes(__func__, "mps-", 1, d, n, p);
}

int nvmlDeviceGetSupportedEventTypes(device *d, unsigned long long *types) {
  gpu found;
  int error = asked(d, &found, __func__);
  *types = strcmp(found.fault, "no-events") ? XID : 0;
  return error;
}

int nvmlEventSetCreate(event_set **set) {
  if (!inits) return UNINITIALIZED;
  for (int i = 0; i < 8; i++)
    if (!sets[i].used) return sets[i] = (event_set){1, {0}}, *set = &sets[i], SUCCESS;
  return UNKNOWN;
}

int nvmlEventSetFree(event_set *set) { return set->used = 0, inits ? SUCCESS : UNINITIALIZED; }

int nvmlDeviceRegisterEvents(device *d, unsigned long long types, event_set *set) {
  gpu found;
  int error = asked(d, &found, __func__);
  if (!error && types == XID) set->registered[d - devices] = 1;
  return error;
}

/* The next line of xids for a GPU in the set: its index; -1 when there is none yet. Earlier lines of others are gone. */
static int next_xid(event_set *set, event *data) {
  char line[LINE], uuid[96];
  unsigned code;
  int at = 0, index = -1;
  stream *file = opened("xids", "", "r");
  if (!file) return -1;
  while (index < 0 && fgets(line, sizeof line, file))
    if (at++ >= told && sscanf(line, "%95s %u", uuid, &code) == 2)
      for (int i = 0; i < MOST && index < 0; i++)
        if (set->registered[i] && !strcmp(devices[i].uuid, uuid)) index = i;
  fclose(file);
  if (index < 0) return -1;
  told = at;
  *data = (event){&devices[index], XID, code, 0xffffffff, 0xffffffff};
  return index;
}

int nvmlEventSetWait_v2(event_set *set, event *data, unsigned timeout_ms) {
  gpu found;
  for (unsigned waited_us = 0; waited_us <= timeout_ms * 1000; waited_us += POLL_US) {
    if (!inits) return UNINITIALIZED;
    if (next_xid(set, data) >= 0) return SUCCESS;
    for (int i = 0; i < MOST; i++) /* as the real one: one lost GPU fails the wait for all */
      if (set->registered[i] && (find(0, devices[i].uuid, &found) < 0 || atoi(found.fault) == GPU_IS_LOST)) return GPU_IS_LOST;
    usleep(POLL_US);
  }
  return TIMEOUT;
}
