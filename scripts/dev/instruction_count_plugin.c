// A plugin of QEMU (5.0 or newer) that prints the number of executed instructions. QEMU's header is
// rarely installed, so the functions of it that the plugin uses are declared here.
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

#define EXPORTED __attribute__((visibility("default")))

typedef uint64_t Id;
struct qemu_plugin_tb;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* block);
void qemu_plugin_register_vcpu_tb_trans_cb(Id id, void (*callback)(Id, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb* block, int operation,
                                              void* counter, uint64_t by);
void qemu_plugin_register_atexit_cb(Id id, void (*callback)(Id, void*), void* data);

EXPORTED int qemu_plugin_version = 1;

static uint64_t executed;

static void on_translation(Id id, struct qemu_plugin_tb* block) {
  (void)id;
  const int add = 0;
  qemu_plugin_register_vcpu_tb_exec_inline(block, add, &executed, qemu_plugin_tb_n_insns(block));
}

static void on_exit(Id id, void* data) {
  (void)id;
  (void)data;
  printf("%" PRIu64 "\n", executed);
  fflush(stdout);  // QEMU does not flush it
}

EXPORTED int qemu_plugin_install(Id id, const void* info, int count, char** arguments) {
  (void)info;
  (void)count;
  (void)arguments;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  qemu_plugin_register_atexit_cb(id, on_exit, NULL);
  return 0;
}
